"""Changes of dtype, and their effect on values."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Literal

import torch
from torch import Tensor

from sharded_spd.anchors.base import AnchorStore, Cast, Values, VouchedStore
from sharded_spd.anchors.fingerprint import SEEDS, slice_fingerprint
from sharded_spd.safetensors_io.reader import StoredTensor, read_piece
from sharded_spd.sharding.layout import Box, FlatRange, ShardSlice

_CHUNK = 1 << 18
_LOSSLESS = {(torch.bfloat16, torch.float32), (torch.float16, torch.float32)}


def may_lose(stored: torch.dtype, dtype: torch.dtype | None) -> bool:
    """Whether values can change on the way from `stored` to `dtype` (None: as stored)."""
    return dtype not in (None, stored) and (stored, dtype) not in _LOSSLESS


@torch.no_grad()
def worst_change(before: Values, after: Values) -> float:
    """The largest |after - before| / |before| of flat values; 0 if none changed, inf out of range."""
    worst = torch.zeros((), dtype=torch.float64, device=before.device)
    for begin in range(0, before.numel(), _CHUNK):
        old = before[begin : begin + _CHUNK].double()
        new = after[begin : begin + _CHUNK].to(old.device).double()
        moved = (new - old).abs() / old.abs()
        # NaN: 0 before and after, or infinite before and after.
        worst = torch.maximum(worst, torch.where(moved.isnan(), 0.0, moved).max())
    return float(worst)


def cast_of(
    anchor: AnchorStore | Literal["snapshot"], layer: str, weight: Tensor, values: Values | None
) -> Cast | None:
    """The effect of a change of dtype on values just fetched; without a fingerprint for snapshots."""
    if values is None:
        return None
    if isinstance(anchor, VouchedStore):
        return anchor.cast(layer)
    if anchor == "snapshot" and may_lose(weight.dtype, values.dtype):
        return Cast((0,) * len(SEEDS), worst_change(weight, values))
    return None


def is_away(anchor: AnchorStore | Literal["snapshot"], weight: Tensor, values: Values | None) -> bool:
    """Whether a checkpoint's values differ from the weights that the run starts with."""
    if values is None or not isinstance(anchor, VouchedStore):
        return False
    return not same_values(weight, values)


@torch.no_grad()
def same_values(weight: Tensor, values: Values) -> bool:
    """Whether flat weights are these values, in the dtype of either: one may be a rounded copy."""
    for begin in range(0, weight.numel(), _CHUNK):
        one = weight[begin : begin + _CHUNK]
        other = values[begin : begin + _CHUNK].to(one.device)
        if not (torch.equal(one.to(other.dtype), other) or torch.equal(one, other.to(one.dtype))):
            return False
    return True


@torch.no_grad()
def read_cast(tensor: StoredTensor, piece: ShardSlice, dtype: torch.dtype) -> tuple[Tensor, Cast]:
    """The values of `piece` in `dtype`, and the effect of the cast; needs a few MiB beyond the result.

    Raises:
        AnchorError: the region lies outside the tensor, or the file has changed since its header was read.
    """
    out = torch.empty(piece.numel, dtype=dtype)
    total, worst = torch.zeros(len(SEEDS), dtype=torch.int64), 0.0
    for part in _parts(piece):
        stored = read_piece(tensor, part.region, numel=part.numel)
        into = out[part.offset : part.offset + part.numel]
        into.copy_(stored)
        total += slice_fingerprint(stored, part, tensor.shape)
        worst = max(worst, worst_change(stored, into))
    return out, Cast(tuple(total.tolist()), worst)


def _parts(piece: ShardSlice) -> Iterator[ShardSlice]:
    """Cut a slice into slices of at most `_CHUNK` elements; their `offset` is relative to the slice."""
    if isinstance(piece.region, FlatRange):
        for begin in range(0, piece.numel, _CHUNK):
            numel = min(_CHUNK, piece.numel - begin)
            yield ShardSlice(piece.layer, begin, numel, FlatRange(piece.region.start + begin))
    else:
        yield from _boxes(piece.layer, piece.region, 0, 0)


def _boxes(layer: str, box: Box, dim: int, offset: int) -> Iterator[ShardSlice]:
    """Cut a box, of which all dims before `dim` have size 1, along `dim`, or a row of it along the next."""
    numel = prod(box.sizes)
    if numel <= _CHUNK:
        if numel:
            yield ShardSlice(layer, offset, numel, box)
        return
    row = prod(box.sizes[dim + 1 :])
    step = max(1, _CHUNK // row)
    for begin in range(0, box.sizes[dim], step):
        offsets, sizes = list(box.offsets), list(box.sizes)
        offsets[dim], sizes[dim] = box.offsets[dim] + begin, min(step, box.sizes[dim] - begin)
        yield from _boxes(layer, Box(tuple(offsets), tuple(sizes)), dim + 1, offset + begin * row)
