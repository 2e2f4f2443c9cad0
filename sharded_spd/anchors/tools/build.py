"""Making an anchor's files and their manifest, and finding out whether files still are what it says.

Whatever the size of the model, one chunk of one tensor is in memory at a time.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sharded_spd.anchors.casting import may_lose, worst_change
from sharded_spd.anchors.checkpoint import INDEX, Checkpoint
from sharded_spd.anchors.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    TensorEntry,
    other_values,
    write_manifest,
)
from sharded_spd.anchors.paths import some
from sharded_spd.anchors.tools.scan import Progress, chunks, scan_file
from sharded_spd.errors import AnchorError
from sharded_spd.safetensors_io.reader import StoredTensor
from sharded_spd.safetensors_io.writer import DTYPES, RawEntry, TensorFile

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(slots=True)
class Built:
    """What was written; `lossy`: the tensors that a change of dtype changed, and by how much at most."""

    manifest: Manifest
    lossy: dict[str, float] = field(default_factory=dict)


def parse_size(text: str) -> int:
    """Bytes of "5GB", "512MiB" or a plain number.

    Raises:
        AnchorError: it is none of these, or 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B|)\s*", text.upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise AnchorError(f"max-shard-size: wanted a size such as 5GB or 512MiB, got {text!r}")
    return size


def add_manifest(source: str, *, name: str | None = None, progress: Progress | None = None) -> Manifest:
    """Write anchor.json beside the files of a checkpoint, which is `name` (by default its path).

    Raises:
        AnchorError: the files are damaged, or have a manifest already.
    """
    checkpoint = Checkpoint(source)
    path = checkpoint.folder / MANIFEST
    if path.exists():
        raise AnchorError(f"{path}: is there already; verify it, or remove it to write it anew")
    manifest = scan(checkpoint, name=name, progress=progress)
    try:
        write_manifest(manifest)
    except OSError as error:
        raise AnchorError(f"{path}: cannot be written: {error.strerror}") from None
    return manifest


def scan(checkpoint: Checkpoint, *, name: str | None = None, progress: Progress | None = None) -> Manifest:
    """The manifest of the files as they are now; reads all of them.

    Raises:
        AnchorError: a file is damaged, or lacks what the index says.
    """
    files: dict[str, FileEntry] = {}
    tensors: dict[str, TensorEntry] = {}
    for path in sorted(set(checkpoint.files().values())):
        files[checkpoint.relative(path)], found = scan_file(path, progress)
        # An index may leave out what lies in its files.
        tensors |= {key: e for key, e in found.items() if checkpoint.files().get(key) == path}
    for key in checkpoint.files():
        checkpoint.tensor(key)
    source = checkpoint.source if name is None else name
    return Manifest(str(checkpoint.folder / MANIFEST), source, tensors, files)


def build(
    source: str,
    target: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    name: str | None = None,
    progress: Progress | None = None,
) -> Built:
    """Copy a checkpoint's tensors to the new directory `target`, floating point in `dtype`, with a manifest.

    Written beside and renamed: `target` is there whole or not at all.

    Raises:
        AnchorError: the source is damaged, `target` exists, or it cannot be written.
    """
    checkpoint, folder = Checkpoint(source), Path(target)
    tensors = [checkpoint.tensor(key) for key in checkpoint.files()]
    if not tensors:
        raise AnchorError(f"{source}: holds no tensor")
    if folder.exists() or folder.is_symlink():
        raise AnchorError(f"{folder}: exists already; name a new directory, or remove it first")
    shards = _share_out(tensors, dtype, max_shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    beside = folder.absolute().with_name(f".{folder.name}.{os.getpid()}")
    weight_map: dict[str, str] = {}
    lossy: dict[str, float] = {}
    try:
        beside.mkdir(parents=True)
        for file, shard in zip(names, shards, strict=True):
            lossy |= _write_file(beside / file, shard, dtype, progress)
            weight_map |= {tensor.name: file for tensor in shard}
        if len(shards) > 1:
            total = sum(_num_bytes(tensor, dtype) for tensor in tensors)
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (beside / f"model{INDEX}").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        # What is vouched for is what lies on the disk, so it is read again.
        built = scan(Checkpoint(str(beside)), name=source if name is None else name, progress=progress)
        _compare(checkpoint, built, lossy)
        write_manifest(built)
        os.rename(beside, folder)
    except OSError as error:
        raise AnchorError(f"{folder}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return Built(Manifest(str(folder / MANIFEST), built.source, built.tensors, built.files), lossy)


def _compare(checkpoint: Checkpoint, built: Manifest, lossy: Collection[str]) -> None:
    """Refuse to copy what is not what the source's own manifest says."""
    manifest = checkpoint.manifest()
    entries = manifest.tensors if manifest is not None else {}
    wrong = [
        key
        for key, entry in built.tensors.items()
        if key in entries and key not in lossy and entries[key].fingerprint != entry.fingerprint
    ]
    wrong += [key for key in lossy if any(checkpoint.fault(checkpoint.tensor(key)))]
    if wrong:
        raise AnchorError(other_values(f"{checkpoint.source}: {some(wrong)}", "the manifest there"))


def verify(source: str, *, sampled: bool = False, progress: Progress | None = None) -> list[str]:
    """What is wrong with an anchor's files by their manifest, one sentence each; none: nothing is.

    Reads everything, or if `sampled` only sizes, headers and a few blocks of each tensor.

    Raises:
        AnchorError: there is nothing to compare: no such path, no manifest, or a damaged one.
    """
    checkpoint = Checkpoint(source)
    manifest = checkpoint.manifest()
    if manifest is None:
        raise AnchorError(
            f"{checkpoint.folder}: has no {MANIFEST} of it; sharded-spd anchor build writes one"
        )
    found = [
        f"{checkpoint.folder / name}: is missing"
        for name in manifest.files
        if not (checkpoint.folder / name).is_file()
    ]
    try:
        present = checkpoint.files()
    except AnchorError as error:
        return [*found, str(error)]
    found += [f"{key}: is missing; {manifest.path} has it" for key in manifest.tensors if key not in present]
    for path in sorted(set(present.values())):
        file = checkpoint.relative(path)
        if (checkpoint.folder / file).is_file():
            keys = [key for key, where in present.items() if where == path]
            found += _verify_file(checkpoint, manifest, path, keys, sampled=sampled, progress=progress)
    return found


def _verify_file(
    checkpoint: Checkpoint,
    manifest: Manifest,
    path: str,
    keys: Sequence[str],
    *,
    sampled: bool,
    progress: Progress | None,
) -> list[str]:
    found: list[str | None] = []
    file = checkpoint.relative(path)
    try:
        held = [checkpoint.tensor(key) for key in keys]
        found.append(manifest.file_fault(path, file, held[0].file_bytes))
        found += [manifest.tensor_fault(tensor, blocks=sampled) for tensor in held]
        entry, tensors = (None, {}) if sampled else scan_file(path, progress)
    except AnchorError as error:
        return [*filter(None, found), str(error)]
    owners = {e.fingerprint: key for key, e in manifest.tensors.items()}
    for key, got in tensors.items():
        wanted = manifest.tensors.get(key)
        if wanted is None or key not in keys or got.fingerprint == wanted.fingerprint:
            continue
        whose = owners.get(got.fingerprint)
        swapped = f"; they are those of {whose!r}" if whose is not None else ""
        found.append(other_values(f"{path} ({key})", manifest.path) + swapped)
    if not any(found) and entry is not None and entry.sha256 != manifest.files[file].sha256:
        found.append(
            f"{path}: has another SHA-256 than {manifest.path} says, although all values of its "
            f"{len(keys)} tensors are the same: it was written anew"
        )
    return [*filter(None, found)]


def _share_out(
    tensors: Sequence[StoredTensor], dtype: torch.dtype | None, limit: int
) -> list[list[StoredTensor]]:
    """Fill one file after the other up to `limit` bytes; a larger tensor has a file of its own."""
    shards: list[list[StoredTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = _num_bytes(tensor, dtype)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def _write_file(
    path: Path, tensors: Sequence[StoredTensor], dtype: torch.dtype | None, progress: Progress | None
) -> dict[str, float]:
    """Write a safetensors file; returns the tensors that a change of dtype changed, and by how much."""
    # Wide elements first, so that all lie aligned.
    tensors = sorted(tensors, key=lambda t: -(_num_bytes(t, dtype) // max(1, math.prod(t.shape))))
    entries = [
        RawEntry(tensor.name, _stored_as(tensor, dtype), tensor.shape, _num_bytes(tensor, dtype))
        for tensor in tensors
    ]
    lossy = {}
    with TensorFile(path, entries, {"format": "pt"}) as file:
        for tensor in tensors:
            worst = 0.0
            for _, data in chunks(tensor):
                out, change = _convert(data, tensor, _new_dtype(tensor, dtype))
                worst = max(worst, change)
                file.append_bytes(out)
                if progress is not None:
                    progress(len(data))
            if worst > 0:
                lossy[tensor.name] = worst
    return lossy


def _convert(data: memoryview, tensor: StoredTensor, dtype: torch.dtype | None) -> tuple[memoryview, float]:
    """A chunk's bytes in `dtype` (None: as they are), and the largest relative change of a value."""
    if dtype is None or tensor.dtype is None:
        return data, 0.0
    values = torch.frombuffer(data, dtype=tensor.dtype)
    out = memoryview(bytearray(values.numel() * dtype.itemsize))
    cast = torch.frombuffer(out, dtype=dtype).copy_(values)
    return out, worst_change(values, cast) if may_lose(tensor.dtype, dtype) else 0.0


def _new_dtype(tensor: StoredTensor, dtype: torch.dtype | None) -> torch.dtype | None:
    """None where a tensor is written as it is: no floating point, or of that dtype already."""
    return None if tensor.dtype in (None, dtype) else dtype


def _stored_as(tensor: StoredTensor, dtype: torch.dtype | None) -> str:
    new = _new_dtype(tensor, dtype)
    return tensor.stored_as if new is None else DTYPES[new]


def _num_bytes(tensor: StoredTensor, dtype: torch.dtype | None) -> int:
    new = _new_dtype(tensor, dtype)
    return tensor.num_bytes if new is None else math.prod(tensor.shape) * new.itemsize
