"""Of which two checkpoints a folder was made, so that a later run can tell whether it would be the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sharded_spd.anchors.tools.beside import RECORD
from sharded_spd.errors import AnchorError

_FORMAT = "sharded_spd.interpolation/1"


@dataclass(frozen=True, slots=True)
class Origin:
    """Two checkpoints, and what is kept of the second. Files are told by their names, sizes and times."""

    start: str
    end: str
    keep: tuple[str, ...]
    start_files: str
    end_files: str

    @classmethod
    def of(
        cls,
        start: tuple[Path, Iterable[str | Path]],
        end: tuple[Path, Iterable[str | Path]],
        keep: Sequence[str],
    ) -> Origin:
        """As the files, given with the path of each checkpoint, are now.

        Raises:
            AnchorError: one of them is gone.
        """
        try:
            first, second = (_digest(_stamps(files, path)) for path, files in (start, end))
        except OSError as error:
            raise AnchorError(f"{error.filename}: cannot be read: {error.strerror}") from None
        paths = os.path.realpath(start[0]), os.path.realpath(end[0])
        return cls(*paths, keep=tuple(sorted(set(keep))), start_files=first, end_files=second)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "keep": list(self.keep)}


def write_record(folder: Path, origin: Origin, alpha: float) -> None:
    """Write what the finished `folder` is and holds.

    Raises:
        OSError: it cannot be written.
    """
    files = _stamps((path for path in folder.rglob("*") if path.is_file()), folder)
    content = {"format": _FORMAT, "alpha": alpha, **origin.to_dict(), "files": files}
    (folder / RECORD).write_text(json.dumps(content, indent=1), encoding="utf-8")


def is_same(folder: Path, origin: Origin, alpha: float) -> bool:
    """Whether `folder` holds, whole and untouched, what would be written there; False if it cannot tell."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        files = found.pop("files")
        unchanged = files == _stamps((folder / name for name in files), folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return bool(unchanged and found == {"format": _FORMAT, "alpha": alpha, **origin.to_dict()})


def _stamps(files: Iterable[str | Path], base: Path) -> dict[str, list[int]]:
    """Size and time of the last change of each file, by its path as seen from `base`."""
    found = {}
    for path in files:
        stat = os.stat(path)
        found[Path(os.path.relpath(path, base)).as_posix()] = [stat.st_size, stat.st_mtime_ns]
    return dict(sorted(found.items()))


def _digest(stamps: Mapping[str, list[int]]) -> str:
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:32]
