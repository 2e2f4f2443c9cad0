"""Fingerprints stand in files and checkpoints: they must never change, whatever becomes faster."""

from __future__ import annotations

import itertools
import random
import struct
from math import prod

import pytest
import torch

from sharded_spd.anchors.fingerprint import SEEDS, slice_fingerprint
from sharded_spd.sharding.layout import Box, FlatRange, ShardSlice

MASK = (1 << 64) - 1


def mix64(x: int) -> int:
    """SplitMix64's finaliser, on one number."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def element_by_element(values: list[float], indices: list[int]) -> list[int]:
    """The definition: mix64 of seed, index in the whole layer and float32 bits, summed modulo 2^64."""
    totals = []
    for seed in SEEDS:
        total = 0
        for value, index in zip(values, indices, strict=True):
            (bits,) = struct.unpack("<I", struct.pack("<f", value + 0.0))
            total += mix64(((mix64(index) ^ bits) + seed) & MASK)
        total &= MASK
        totals.append(total - (1 << 64) if total >> 63 else total)
    return totals


def test_a_known_fingerprint_is_still_the_same() -> None:
    values = torch.arange(100_000, dtype=torch.float32).sub(3).div(7)
    piece = ShardSlice("w", 0, 100_000, FlatRange(0))
    found = slice_fingerprint(values, piece, (100_000,)).tolist()
    assert found == [-8761325760469282488, 3105852911426734065]


@pytest.mark.parametrize("dims", [0, 1, 2, 3, 4])
def test_any_block_of_any_layer_is_as_defined(dims: int) -> None:
    rng = random.Random(dims)
    for _ in range(60):
        shape = tuple(rng.randint(1, 6) for _ in range(dims))
        offsets = tuple(rng.randint(0, size - 1) if rng.random() < 0.6 else 0 for size in shape)
        sizes = tuple(
            rng.randint(0, size - at) if rng.random() < 0.4 else size - at
            for size, at in zip(shape, offsets, strict=True)
        )
        values = torch.randn(prod(sizes), generator=torch.Generator().manual_seed(rng.randint(0, 99)))
        coordinates = itertools.product(
            *(range(at, at + size) for at, size in zip(offsets, sizes, strict=True))
        )
        indices = [
            sum(c * prod(shape[d + 1 :]) for d, c in enumerate(coordinate)) for coordinate in coordinates
        ]
        piece = ShardSlice("w", 0, values.numel(), Box(offsets, sizes))
        found = slice_fingerprint(values, piece, shape).tolist()
        assert found == element_by_element(values.tolist(), indices), (shape, offsets, sizes)


def test_columns_of_more_than_one_chunk_add_up_to_the_whole() -> None:
    whole = torch.randn(1000, 96, generator=torch.Generator().manual_seed(0))
    want = slice_fingerprint(
        whole.reshape(-1), ShardSlice("w", 0, whole.numel(), FlatRange(0)), tuple(whole.shape)
    )
    total = torch.zeros_like(want)
    for begin, end in ((0, 40), (40, 96)):
        part = whole[:, begin:end].reshape(-1)
        piece = ShardSlice("w", 0, part.numel(), Box((0, begin), (1000, end - begin)))
        total += slice_fingerprint(part, piece, tuple(whole.shape))
    assert total.tolist() == want.tolist()
