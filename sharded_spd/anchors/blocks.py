"""Samples a few blocks of a tensor's stored bytes: enough to notice another file without a full read."""

from __future__ import annotations

import os
from hashlib import blake2b

from sharded_spd.errors import AnchorError
from sharded_spd.safetensors_io.reader import StoredTensor

BLOCK_BYTES = 4096
_BETWEEN = 2


def block_spans(name: str, num_bytes: int) -> list[tuple[int, int]]:
    """Begin and end of the sampled blocks of a tensor: the first, the last, and two chosen by its name."""
    if num_bytes <= BLOCK_BYTES:
        return [(0, num_bytes)] if num_bytes else []
    last = num_bytes - BLOCK_BYTES
    between = []
    for i in range(_BETWEEN):
        digest = blake2b(f"{i}:{name}".encode(), digest_size=8, usedforsecurity=False).digest()
        between.append(int.from_bytes(digest, "little") % (last + 1))
    return [(begin, begin + BLOCK_BYTES) for begin in (0, *between, last)]


def hash_blocks(tensor: StoredTensor) -> tuple[str, ...]:
    """The hash of each sampled block, blake2b of 128 bits in hexadecimal.

    Raises:
        AnchorError: the file cannot be read, or is shorter than its header said.
    """
    hashes = []
    try:
        with open(tensor.path, "rb", buffering=0) as file:
            for begin, end in block_spans(tensor.name, tensor.num_bytes):
                data = os.pread(file.fileno(), end - begin, tensor.begin + begin)
                if len(data) != end - begin:
                    raise AnchorError(f"{tensor.path}: truncated while tensor {tensor.name!r} was read")
                hashes.append(blake2b(data, digest_size=16, usedforsecurity=False).hexdigest())
    except OSError as error:
        raise AnchorError(f"{tensor.path}: reading {tensor.name!r} failed: {error.strerror}") from None
    return tuple(hashes)
