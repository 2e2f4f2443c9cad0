"""Names of files and tensors: which are refused, and how a list of them is shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath, PureWindowsPath


def leads_out(name: str) -> bool:
    """Whether a file name of an index or manifest points out of its directory, on any system."""
    parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
    return ".." in parts or PurePosixPath(name).is_absolute() or bool(PureWindowsPath(name).anchor)


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first few of a list, and how many more there are."""
    listed: Sequence[str] = list(names)
    more = f", ... ({len(listed) - limit} more)" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
