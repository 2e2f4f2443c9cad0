"""Anchors that stay on disk: safetensors files mapped into memory, of which each step reads what it needs.

What is mapped takes no memory of its own: its pages are the kernel's cache of the file, which the ranks of a
node share and the kernel drops when memory is short.
"""

from __future__ import annotations

import mmap
import os
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sharded_spd.anchors.base import Cast
from sharded_spd.anchors.casting import may_lose, worst_change
from sharded_spd.anchors.files import FileAnchor
from sharded_spd.anchors.fingerprint import slice_fingerprint
from sharded_spd.errors import AnchorError
from sharded_spd.safetensors_io.reader import StoredTensor, check_piece
from sharded_spd.sharding.layout import Box, FlatRange, ShardSlice

Stamp = tuple[int, int, int, int]
"""Device, inode, size and time of the last change of a file."""


class MappedAnchor(FileAnchor):
    """As `FileAnchor`, but the values stay in their files, which are mapped as long as any are bound."""

    on_disk = True

    def _read(self, tensor: StoredTensor, piece: ShardSlice) -> MappedValues:
        self._casts.pop(piece.layer, None)
        values = MappedValues(tensor, piece.region, piece.numel, self._dtype)
        if tensor.dtype is not None and may_lose(tensor.dtype, self._dtype):
            stored = MappedValues(tensor, piece.region, piece.numel)
            prints = slice_fingerprint(stored, piece, tensor.shape)
            self._casts[piece.layer] = Cast(tuple(prints.tolist()), worst_change(stored, values))
        return values


class MappedValues:
    """A region of a stored tensor, 1-D, of which chunks are read from the mapped file; see `Values`.

    A chunk is a view of the file where that is laid out as asked, else a copy of the runs that it needs.

    Raises:
        AnchorError: the region lies outside the tensor, or the file has changed since its header was read.
    """

    __slots__ = ("_file", "_made_of", "_numel", "_part", "_stored", "dtype")

    device = torch.device("cpu")

    def __init__(
        self, tensor: StoredTensor, region: FlatRange | Box, numel: int, dtype: torch.dtype | None = None
    ) -> None:
        self._stored = check_piece(tensor, region, numel)
        self._made_of = (tensor, region, numel, dtype)
        self.dtype = dtype or self._stored
        self._numel = numel
        self._file = map_file(tensor.path)
        if self._file.size != tensor.file_bytes:
            raise AnchorError(f"{tensor.path}: changed while it was in use (tensor {tensor.name!r})")
        self._part = _region(_whole(self._file.data, tensor, self._stored), region, numel)

    def numel(self) -> int:
        """The number of values."""
        return self._numel

    def __getitem__(self, cut: slice, /) -> Tensor:
        """The values `[cut.start, cut.stop)`, 1-D, perhaps a view that cannot be written to."""
        begin, end, step = cut.indices(self._numel)
        if step != 1:
            raise ValueError(f"wanted a slice of step 1, got {cut}")
        end = max(begin, end)
        if self._part.dtype == self._stored:
            return gather(self._part, begin, end).to(self.dtype)
        size = self._stored.itemsize
        # What lies askew is held as bytes, a copy of which is aligned.
        return gather(self._part, begin * size, end * size).clone().view(self._stored).to(self.dtype)

    def whole(self) -> Tensor | None:
        """All values as a view of the file, where they lie there as asked; None where chunks are made."""
        if self._part.dtype != self.dtype or not self._part.is_contiguous():
            return None
        return self._part.reshape(-1)

    def changed(self) -> str | None:
        """How the file has changed since it was mapped, if at all; then the values are lost."""
        return self._file.changed()

    def check(self) -> None:
        """Raise AnchorError if the file has changed."""
        changed = self.changed()
        if changed is not None:
            raise AnchorError(changed)

    def __deepcopy__(self, memo: dict[int, Any]) -> MappedValues:
        """Nothing can write to them: a copy is the same."""
        return self

    def __reduce__(self) -> tuple[Callable[..., MappedValues], tuple[Any, ...]]:
        """A pickle names the file, which has to be there when it is loaded."""
        return MappedValues, self._made_of


def _whole(data: Tensor, tensor: StoredTensor, dtype: torch.dtype) -> Tensor:
    """The stored tensor; as bytes, in one more dim, where it lies askew in the file."""
    size = dtype.itemsize
    stored = data[tensor.begin : tensor.begin + torch.Size(tensor.shape).numel() * size]
    if tensor.begin % size:
        return stored.view(*tensor.shape, size)
    return stored.view(dtype).view(tensor.shape)


def _region(whole: Tensor, region: FlatRange | Box, numel: int) -> Tensor:
    """A view of what the region holds of the tensor, or of its bytes."""
    if isinstance(region, Box):
        for dim, (offset, size) in enumerate(zip(region.offsets, region.sizes, strict=True)):
            whole = whole.narrow(dim, offset, size)
        return whole
    size = whole.shape[-1] if whole.dtype == torch.uint8 else 1
    return whole.reshape(-1)[region.start * size : (region.start + numel) * size]


def gather(part: Tensor, begin: int, end: int) -> Tensor:
    """Elements `[begin, end)` of a strided view, flattened: a view where they are contiguous, else a copy.

    Copies them and no others.
    """
    if begin == end:
        return part.new_empty(0)
    if part.is_contiguous():
        return part.reshape(-1)[begin:end]
    row = part.shape[1:].numel()
    first, last = begin // row, end // row
    if first == last:
        return gather(part[first], begin - first * row, end - first * row)
    pieces = []
    if begin % row:
        pieces.append(gather(part[first], begin - first * row, row))
        first += 1
    if first < last:
        pieces.append(part[first:last].reshape(-1))
    if end % row:
        pieces.append(gather(part[last], 0, end - last * row))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class MappedFile:
    """The bytes of a file, uint8; unmapped when the last view of them is gone.

    The file stays open, so that a change of this very file is told from another one under its name.
    """

    def __init__(self, path: str) -> None:
        try:
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise AnchorError(f"{path}: cannot be read: {error.strerror}") from None
        weakref.finalize(self, os.close, fd)
        self._path = path
        self._fd = fd
        self._stamp = stamp(fd)
        try:
            self.data = _as_tensor(mmap.mmap(fd, 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            raise AnchorError(f"{path}: cannot be mapped into memory: {error}") from None

    @property
    def size(self) -> int:
        """In bytes."""
        return self.data.numel()

    def changed(self) -> str | None:
        """How the file has changed since it was mapped, if at all; costs a system call."""
        try:
            now = stamp(self._fd)
        except OSError as error:  # a file server's handle has gone stale
            return f"{self._path}: cannot be read any more: {error.strerror}"
        if now == self._stamp:
            return None
        what = f"{self._stamp[2]} bytes long then, {now[2]} now" if now[2] != self._stamp[2] else "written to"
        return (
            f"{self._path}: has changed since its values were bound ({what}); an anchor on disk must stay as "
            "it is while it is in use: put the file back and start again from the last checkpoint"
        )


_maps: weakref.WeakValueDictionary[tuple[str, Stamp], MappedFile] = weakref.WeakValueDictionary()


def map_file(path: str) -> MappedFile:
    """The file's one map in this process.

    Raises:
        AnchorError: it cannot be read.
    """
    try:
        key = (path, stamp(path))
    except OSError as error:
        raise AnchorError(f"{path}: cannot be read: {error.strerror}") from None
    found = _maps.get(key)
    if found is None:
        found = _maps[key] = MappedFile(path)
    return found


def stamp(file: str | int) -> Stamp:
    """What changes when a file is replaced, cut off or written to; a path or a descriptor."""
    found = os.stat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _as_tensor(data: mmap.mmap) -> Tensor:
    # A map that could be written to (privately) would be charged as memory where overcommitting is off.
    # torch has no tensors that cannot be written to, and says so once: nothing here writes to this one.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(data, dtype=torch.uint8)
