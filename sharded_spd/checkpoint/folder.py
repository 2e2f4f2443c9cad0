"""Checkpoint folders: written under a temporary name, marked complete, renamed, found, deleted.

A folder `step-N` is a checkpoint only with its marker, which lists every file with its size and is written
last. So a save that is killed at any moment leaves the earlier folders unchanged.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharded_spd.errors import CheckpointError

MARKER = "complete.json"
FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})", re.ASCII)
_OLD = re.compile(r"\.step-(\d{8,})\.[0-9a-f]+\.old", re.ASCII)
_PART = re.compile(r"\.step-(\d{8,})\.[0-9a-f]+\.part", re.ASCII)


@dataclass(frozen=True, slots=True)
class Found:
    """The newest complete checkpoint, and one sentence for each newer folder that is not complete."""

    path: Path | None
    skipped: tuple[str, ...]


def folder_of(directory: Path, step: int) -> Path:
    """The path of a step's checkpoint."""
    return directory / f"step-{step:08d}"


def start_folder(final: Path) -> Path:
    """Make an empty folder beside `final` to write into."""
    part = final.with_name(f".{final.name}.{secrets.token_hex(4)}.part")
    part.mkdir(parents=True)
    return part


def finish_folder(part: Path, final: Path, facts: dict[str, Any]) -> None:
    """Flush `part` to the disk, mark it complete, and move it to `final`."""
    files = {str(path.relative_to(part)): path for path in sorted(part.rglob("*")) if path.is_file()}
    for path in files.values():
        _sync(path)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    write_json(part / MARKER, {"format": FORMAT, **facts, "files": sizes})
    for folder in {part, *(path.parent for path in files.values())}:
        _sync(folder)
    old = None
    if final.exists():
        old = final.with_name(f".{final.name}.{secrets.token_hex(4)}.old")
        os.rename(final, old)
    os.rename(part, final)
    _sync(final.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file and flush it to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: there is no such file, or it holds no JSON object.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged: {str(error) or type(error).__name__}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is damaged: wanted an object, got {type(value).__name__}")
    return value


def check_complete(folder: Path) -> dict[str, Any]:
    """The marker of a complete checkpoint.

    Raises:
        CheckpointError: the folder was not finished, or a file of it is missing or of another size.
    """
    if not (folder / MARKER).is_file():
        raise CheckpointError(f"{folder}: is no complete checkpoint: it has no {MARKER}")
    marker = read_json(folder / MARKER)
    files, step = marker.get("files"), marker.get("step")
    if marker.get("format") != FORMAT or not isinstance(files, dict):
        got = marker.get("format")
        raise CheckpointError(f"{folder}: format {got!r} is not known here; wanted {FORMAT}")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{folder}: is damaged: {MARKER} says step {step!r:.100}")
    for name, size in files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{folder}: {MARKER} names {name!r}, which leads out of the checkpoint")
        have = path.stat().st_size if path.is_file() else None
        if have != size:
            state = "is missing" if have is None else f"has {have} bytes"
            raise CheckpointError(f"{folder}: is damaged: {name} {state}, wanted {size} bytes")
    return marker


def steps_in(directory: Path) -> list[tuple[int, Path]]:
    """All folders that are named like checkpoints, newest first.

    A folder that a killed save was about to replace comes after the new one of the same step.
    """
    if not directory.is_dir():
        return []
    found = []
    for path in directory.iterdir():
        if match := _NAME.fullmatch(path.name) or _OLD.fullmatch(path.name):
            found.append((int(match.group(1)), not path.name.startswith("."), path))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def find_latest(directory: Path, check: Callable[[Path], object] = check_complete) -> Found:
    """The newest checkpoint in a directory that passes `check`."""
    skipped: list[str] = []
    for _, path in steps_in(directory):
        try:
            check(path)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        return Found(path, tuple(skipped))
    return Found(None, tuple(skipped))


def prune(new: Path, step: int, keep: int) -> None:
    """Delete all but the newest complete checkpoints beside `new`, just saved, and leftovers of saves.

    `keep` remain in total: `new`, whatever its step, and the newest others. Incomplete folders newer than it
    remain, too. The marker is deleted first, so that a half-deleted folder is not taken for a checkpoint. A
    symlink is removed, its target is not.
    """
    kept = {new}
    for other, path in steps_in(new.parent):
        if path in kept:
            continue
        complete = _is_complete(path)
        if complete and len(kept) < keep and not path.name.startswith("."):
            kept.add(path)
        elif complete or other < step or path.name.startswith("."):
            _drop(path)
    for path in new.parent.iterdir():
        if (match := _PART.fullmatch(path.name)) and int(match.group(1)) <= step:
            _drop(path)


def _is_complete(path: Path) -> bool:
    try:
        check_complete(path)
    except CheckpointError:
        return False
    return True


def _drop(path: Path) -> None:
    if path.is_symlink():
        path.unlink(missing_ok=True)
        return
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
