"""A source that is not a path may be a Hugging Face hub name; it is looked up in the local cache only."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sharded_spd.errors import AnchorError

_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w][\w./-]*))?")


def find_local(source: str) -> Path:
    """The path that `source` is, or the cached snapshot of `org/name[@revision]`. Downloads nothing.

    Raises:
        AnchorError: it is neither; the message has the command that would fetch it.
    """
    path = Path(os.path.expanduser(source))
    try:
        if path.exists():
            return path
    except (OSError, ValueError):
        pass  # no path at all: too long, or with a zero byte
    match = _NAME.fullmatch(source)
    if match is None:
        raise AnchorError(
            f"{source}: no such file or directory; wanted the path of a safetensors checkpoint or a name of "
            'the hub (org/name). An anchor can also be "snapshot", "deferred" or "zero"'
        )
    name, revision = match["name"], match["revision"]
    command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise AnchorError(
            f"{source}: no such file or directory, and huggingface_hub, whose cache might hold it, is not "
            f"installed; correct the path, or pip install huggingface_hub and fetch it first: {command}"
        ) from None
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        raise AnchorError(
            f"{source}: no such file or directory, nor in the local cache of the hub; correct the path, or "
            f"fetch it first: {command}"
        ) from None
