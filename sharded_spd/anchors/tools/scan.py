"""Reading whole files once, a chunk at a time: SHA-256, fingerprints, sampled blocks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from hashlib import sha256

import torch

from sharded_spd.anchors.blocks import hash_blocks
from sharded_spd.anchors.fingerprint import SEEDS, slice_fingerprint
from sharded_spd.anchors.manifest import FileEntry, TensorEntry
from sharded_spd.errors import AnchorError
from sharded_spd.safetensors_io.reader import StoredTensor, read_header
from sharded_spd.sharding.layout import FlatRange, ShardSlice

CHUNK_BYTES = 4 << 20
Progress = Callable[[int], None]
"""Called with the number of bytes done since the last call."""


def chunks(tensor: StoredTensor) -> Iterator[tuple[int, memoryview]]:
    """(first byte, stored bytes) of a tensor from begin to end; the bytes are valid until the next.

    Raises:
        AnchorError: the file cannot be read, or is shorter than its header said.
    """
    buffer = bytearray(min(CHUNK_BYTES, tensor.num_bytes))
    try:
        with open(tensor.path, "rb", buffering=0) as file:
            file.seek(tensor.begin)
            for begin in range(0, tensor.num_bytes, CHUNK_BYTES):
                view = memoryview(buffer)[: min(CHUNK_BYTES, tensor.num_bytes - begin)]
                done = 0
                while done < len(view):
                    got = file.readinto(view[done:])
                    if not got:
                        raise AnchorError(f"{tensor.path}: truncated while tensor {tensor.name!r} was read")
                    done += got
                yield begin, view
    except OSError as error:
        raise AnchorError(f"{tensor.path}: reading {tensor.name!r} failed: {error.strerror}") from None


def scan_file(path: str, progress: Progress | None = None) -> tuple[FileEntry, dict[str, TensorEntry]]:
    """Everything that a manifest holds of one file.

    Raises:
        AnchorError: the file cannot be read, is no safetensors file, or is truncated or corrupt.
    """
    header = sorted(read_header(path).values(), key=lambda tensor: (tensor.begin, tensor.num_bytes))
    digest, entries = sha256(), {}
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(file.read(header[0].begin if header else -1))
    except OSError as error:
        raise AnchorError(f"{path}: cannot be read: {error.strerror}") from None
    for tensor in header:
        dtype = tensor.dtype or torch.uint8
        total = torch.zeros(len(SEEDS), dtype=torch.int64)
        for begin, data in chunks(tensor):
            digest.update(data)
            values = torch.frombuffer(data, dtype=dtype)
            piece = ShardSlice(tensor.name, 0, values.numel(), FlatRange(begin // dtype.itemsize))
            total += slice_fingerprint(values, piece, tensor.shape)
            if progress is not None:
                progress(len(data))
        numbers = tuple(total.tolist())
        entries[tensor.name] = TensorEntry(tensor.shape, tensor.stored_as, numbers, hash_blocks(tensor))
    return FileEntry(size, digest.hexdigest()), entries
