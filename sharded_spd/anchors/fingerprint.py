"""A fingerprint of values that does not depend on how they are split, nor on a lossless dtype.

Per layer and seed: the sum modulo 2^64, over its elements, of mix64(seed, flat index, bits of the value as
float32), plus, for a float64 that float32 cannot represent, the same of the bits of the rest. The sums of
shards add up to the sum of the full layer, so one int64 all-reduce serves all layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from math import prod

import torch
from torch import Tensor

from sharded_spd.anchors.base import Values
from sharded_spd.sharding.layout import Box, FlatRange, ShardSlice

SEEDS = (0x5350445F616E6368, 0x6F725F7368617264)
_REST = 1 << 62
_CHUNK = 1 << 15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(x: int) -> int:
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >= 1 << 63 else x


def _mix64(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on int64; arithmetic is modulo 2^64."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        x = _xor_shifted(x, shift).mul_(_signed(multiplier))
    return _xor_shifted(x, 31)


def _xor_shifted(x: Tensor, shift: int) -> Tensor:
    """A new tensor x ^ (x >> shift), zeros shifted in; in place beyond the first, since memory is slow."""
    return (x >> shift).bitwise_and_((1 << (64 - shift)) - 1).bitwise_xor_(x)


def _run_start(region: Box, shape: tuple[int, ...]) -> int | None:
    """Where the box begins in the flattened layer if it is contiguous there, like full rows; else None."""
    split = next((dim for dim, size in enumerate(region.sizes) if size != 1), len(shape))
    if region.sizes[split + 1 :] != tuple(shape[split + 1 :]):
        return None
    return sum(offset * prod(shape[dim + 1 :]) for dim, offset in enumerate(region.offsets))


def _flat_indices(
    piece: ShardSlice, shape: tuple[int, ...], begin: int, end: int, device: torch.device
) -> Tensor:
    """Index in the flattened layer of elements `[begin, end)` of the slice, int64."""
    region = piece.region
    if isinstance(region, FlatRange):
        return torch.arange(region.start + begin, region.start + end, device=device)
    start = _run_start(region, shape)
    if start is not None:
        return torch.arange(start + begin, start + end, device=device)
    rest = torch.arange(begin, end, device=device)
    index = torch.full_like(rest, region.offsets[0] * prod(shape[1:]))
    for dim in range(len(shape) - 1, 0, -1):
        coordinate = rest.remainder(region.sizes[dim]).add_(region.offsets[dim])
        index += coordinate.mul_(prod(shape[dim + 1 :]))
        rest = rest.div_(region.sizes[dim], rounding_mode="floor")
    return index.add_(rest.mul_(prod(shape[1:])))


@torch.no_grad()
def slice_fingerprint(values: Values | None, piece: ShardSlice, shape: tuple[int, ...]) -> Tensor:
    """This slice's share of the layer's fingerprint, int64 `[2]`; `values` `[piece.numel]`, None for zero."""
    total = torch.zeros(len(SEEDS), dtype=torch.int64, device=values.device if values is not None else "cpu")
    if values is None:
        return total
    for begin in range(0, piece.numel, _CHUNK):
        chunk = values[begin : begin + _CHUNK]
        # + 0.0 turns -0 into 0: they are the same weight.
        bits = (chunk.float() + 0.0).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        index = _flat_indices(piece, shape, begin, begin + chunk.numel(), chunk.device)
        keyed = _mix64(index) ^ bits
        total += torch.stack([_mix64(keyed + seed).sum() for seed in SEEDS])
        if chunk.dtype == torch.float64:
            rest = chunk - chunk.float()
            held = (rest == 0) | rest.isnan()
            keyed = _mix64(index + _REST) ^ rest.view(torch.int64)
            total += torch.stack([_mix64(keyed + seed).masked_fill(held, 0).sum() for seed in SEEDS])
    return total


def combine(fingerprints: Mapping[str, tuple[int, ...]]) -> str:
    """One hexadecimal fingerprint, 128 bits, of the layers' own by FQN, whatever their order."""
    digest = hashlib.sha256()
    for fqn in sorted(fingerprints):
        digest.update(f"{fqn}:{','.join(str(x) for x in fingerprints[fqn])};".encode())
    return digest.hexdigest()[:32]


def in_words(fingerprint: Iterable[int]) -> list[str]:
    """A layer's fingerprint as manifests and checkpoints have it: 16 hexadecimal digits for each seed."""
    return [f"{x & (1 << 64) - 1:016x}" for x in fingerprint]


def combine_nameless(fingerprints: Iterable[tuple[int, ...]]) -> str:
    """As `combine`, of the values alone, for where one side has no names to key them by."""
    return combine({str(i).zfill(9): prints for i, prints in enumerate(sorted(fingerprints))})
