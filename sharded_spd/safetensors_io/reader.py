"""Reading pieces of a safetensors file with plain reads.

The file is not mapped into memory (`mapped` does that, where the values are to stay on disk): pages of a
mapping count as the process's own until the kernel drops them, and a mapped tensor is a view that keeps the
file open. Here one small buffer bounds what a read takes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from typing import Any

import torch

from sharded_spd.errors import AnchorError
from sharded_spd.sharding.layout import Box, FlatRange

_CHUNK_BYTES = 4 << 20
_READ_THROUGH_BYTES = 64 << 10
"""Rows up to this size are read whole and cropped: one large read costs less than many small ones."""
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in a file; `dtype` is None unless it is floating point of 16 bits or more."""

    path: str
    name: str
    stored_as: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    begin: int
    num_bytes: int
    file_bytes: int


def read_header(path: str) -> dict[str, StoredTensor]:
    """List the tensors of a safetensors file, having checked that the file holds all of their bytes.

    Raises:
        AnchorError: the file cannot be read, is no safetensors file, or is truncated or corrupt.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise AnchorError(f"{path}: is a Git LFS pointer, not the file itself; run git lfs pull")
            if len(start) < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise AnchorError(
                    f"{path}: not a safetensors file, or cut off within its header: {size} bytes long, "
                    f"its first bytes {start.hex(' ') or '(none)'}"
                )
            header = file.read(length)
    except UnicodeEncodeError:
        raise AnchorError(f"{path!r}: is no name of a file") from None
    except OSError as error:
        raise AnchorError(f"{path}: cannot be read: {error.strerror}") from None
    entries = load_json(header, f"{path}: corrupt header")
    entries.pop("__metadata__", None)
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, StoredTensor] = {}
    for name, entry in entries.items():
        stored_as, shape, begin, end = _parse_entry(path, name, entry)
        if 8 + length + end > size:
            raise AnchorError(
                f"{path}: truncated: tensor {name!r} ends at byte {8 + length + end}, but the file "
                f"is {size} bytes long; copy or save it again"
            )
        spans.append((begin, end, name))
        dtype = FLOATS.get(stored_as)
        tensors[name] = StoredTensor(
            path, name, stored_as, dtype, shape, 8 + length + begin, end - begin, size
        )
    _check_spans(path, sorted(spans), size - 8 - length)
    return tensors


def load_json(text: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object that gives no key twice; `where` opens the message of an error."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise AnchorError(f"{where}: {str(error) or type(error).__name__}") from None
    if not isinstance(value, dict):
        raise AnchorError(f"{where}: wanted an object, got {type(value).__name__}")
    return value


def read_piece(
    tensor: StoredTensor, region: FlatRange | Box, *, numel: int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Read `numel` elements of `tensor` as a fresh 1-D tensor in `dtype` (None: as stored).

    Takes `_CHUNK_BYTES` of memory beyond the result.

    Raises:
        AnchorError: the region lies outside the tensor, or the file has changed since its header was read.
    """
    stored = check_piece(tensor, region, numel)
    out = torch.empty(numel, dtype=dtype or stored)
    if numel == 0:
        return out
    try:
        with open(tensor.path, "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != tensor.file_bytes:
                raise AnchorError(f"{tensor.path}: changed while it was in use (tensor {tensor.name!r})")
            reader = _Reader(file, tensor, stored)
            if isinstance(region, FlatRange):
                reader.copy_run(out, region.start)
            else:
                reader.copy_box(out.view(region.sizes), region)
    except OSError as error:
        raise AnchorError(f"{tensor.path}: reading {tensor.name!r} failed: {error.strerror}") from None
    return out


def check_piece(tensor: StoredTensor, region: FlatRange | Box, numel: int) -> torch.dtype:
    """The dtype as stored, having checked that the region is `numel` elements within the tensor.

    Raises:
        AnchorError: it is not, or the tensor is not floating point.
    """
    if tensor.dtype is None:
        raise AnchorError(
            f"{tensor.path}: tensor {tensor.name!r} is {tensor.stored_as}; wanted floating point"
        )
    _check_region(tensor, region, numel)
    return tensor.dtype


class _Reader:
    """Copies runs and boxes of one tensor into place, one buffer's worth at a time."""

    def __init__(self, file: FileIO, tensor: StoredTensor, dtype: torch.dtype) -> None:
        self._file = file
        self._tensor = tensor
        self._dtype = dtype
        self._itemsize = dtype.itemsize
        self._buffer = bytearray()

    def copy_run(self, out: torch.Tensor, start: int) -> None:
        """Fill `out` (modified in place), contiguous, with the elements from `start` on."""
        flat = out.view(-1)
        step = _CHUNK_BYTES // self._itemsize
        for done in range(0, flat.numel(), step):
            part = flat[done : done + step]
            part.copy_(self._load(start + done, part.numel()))

    def copy_box(self, out: torch.Tensor, box: Box, dim: int = 0, origin: int = 0) -> None:
        """Fill `out` (modified in place) with `box` of the sub-tensor `shape[dim:]` at element `origin`."""
        shape, offsets, sizes = self._tensor.shape, box.offsets, box.sizes
        if sizes[dim + 1 :] == shape[dim + 1 :]:
            inner = math.prod(shape[dim + 1 :])
            self.copy_run(out, origin + (offsets[dim] * inner if dim < len(shape) else 0))
            return
        row = math.prod(shape[dim + 1 :])
        first = origin + offsets[dim] * row
        if row * self._itemsize > _READ_THROUGH_BYTES:
            for index in range(sizes[dim]):
                self.copy_box(out[index], box, dim + 1, first + index * row)
            return
        step = _CHUNK_BYTES // (row * self._itemsize)
        for done in range(0, sizes[dim], step):
            count = min(step, sizes[dim] - done)
            rows = self._load(first + done * row, count * row).view(count, *shape[dim + 1 :])
            for inner_dim in range(dim + 1, len(shape)):
                rows = rows.narrow(inner_dim - dim, offsets[inner_dim], sizes[inner_dim])
            out[done : done + count].copy_(rows)

    def _load(self, start: int, count: int) -> torch.Tensor:
        """Read elements into the buffer; the result is a view of it, valid until the next call."""
        need = count * self._itemsize
        if len(self._buffer) < need:
            self._buffer = bytearray(need)
        view = memoryview(self._buffer)[:need]
        self._file.seek(self._tensor.begin + start * self._itemsize)
        done = 0
        while done < need:
            got = self._file.readinto(view[done:])
            if not got:
                raise AnchorError(
                    f"{self._tensor.path}: truncated while tensor {self._tensor.name!r} was read"
                )
            done += got
        return torch.frombuffer(self._buffer, dtype=self._dtype, count=count)


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is given twice")
    return result


def _parse_entry(path: str, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Read dtype, shape and byte range out of one entry of a header."""
    corrupt = AnchorError(f"{path}: corrupt header: tensor {name!r} is described by {entry!r:.200}")
    if not isinstance(entry, dict):
        raise corrupt
    stored_as, shape, span = (
        entry.get("dtype"),
        _counts(entry.get("shape")),
        _counts(entry.get("data_offsets")),
    )
    if not isinstance(stored_as, str) or shape is None or span is None or len(span) != 2:
        raise corrupt
    begin, end = span
    itemsize = FLOATS[stored_as].itemsize if stored_as in FLOATS else None
    if begin > end or (itemsize is not None and end - begin != math.prod(shape) * itemsize):
        raise corrupt
    return stored_as, shape, begin, end


def _counts(value: Any) -> tuple[int, ...] | None:
    """Return a JSON list of integers, none negative, as a tuple; None if it is anything else."""
    return tuple(value) if isinstance(value, list) and all(type(n) is int and n >= 0 for n in value) else None


def _check_spans(path: str, spans: Sequence[tuple[int, int, str]], data_bytes: int) -> None:
    """Refuse tensors that overlap, gaps between them, and bytes after the last one."""
    expected = 0
    for begin, end, name in spans:
        if begin != expected:
            raise AnchorError(f"{path}: corrupt header: tensor {name!r} begins at {begin}, not at {expected}")
        expected = end
    if expected != data_bytes:
        raise AnchorError(f"{path}: corrupt: {data_bytes} bytes of data, its header describes {expected}")


def _check_region(tensor: StoredTensor, region: FlatRange | Box, numel: int) -> None:
    shape = tensor.shape
    if isinstance(region, FlatRange):
        fits = 0 <= region.start and 0 <= numel and region.start + numel <= math.prod(shape)
    else:
        fits = (
            len(region.offsets) == len(region.sizes) == len(shape)
            and all(
                o >= 0 and n >= 0 and o + n <= s
                for o, n, s in zip(region.offsets, region.sizes, shape, strict=True)
            )
            and math.prod(region.sizes) == numel
        )
    if not fits:
        name = f"{tensor.name!r} of shape {list(shape)}"
        raise AnchorError(f"{tensor.path}: {numel} elements at {region} are not within {name}")
