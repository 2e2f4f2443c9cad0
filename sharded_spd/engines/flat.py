"""The slices of layers in one tensor of an optimizer, and the arithmetic of flat tensors.

A flat engine concatenates layers, pads, and gives each rank a window of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sharded_spd.sharding.layout import FlatRange, ShardSlice
from sharded_spd.sharding.reductions import all_reduce_


@dataclass(frozen=True, slots=True)
class FlatPiece:
    """The slices of the model in one tensor of the optimizer, of `numel` elements on this rank.

    `shapes` are those of the full layers, one per slice. `split` are the groups that split the layers,
    `groups` also those of replicas. `flat`: the tensor lacks the layers' own dims. `local` returns the tensor
    that the optimizer updates, if a wrapper may have replaced it.
    """

    slices: tuple[ShardSlice, ...]
    shapes: tuple[tuple[int, ...], ...]
    numel: int
    split: tuple[ProcessGroup, ...] = ()
    groups: tuple[ProcessGroup, ...] = ()
    flat: bool = True
    local: Callable[[], Tensor] | None = None

    def renamed(self, names: Mapping[str, str]) -> FlatPiece:
        """The same with other layer names."""
        return replace(self, slices=tuple(replace(p, layer=names[p.layer]) for p in self.slices))


def overlap(layer: str, begin: int, numel: int, window: tuple[int, int], at: int = 0) -> ShardSlice:
    """The slice in a window `[start, stop)` of a layer that lies at `[begin, begin + numel)`.

    `at` is where the window itself begins in the tensor. Without overlap the slice is empty.
    """
    start, stop = window
    first, last = max(begin, start), min(begin + numel, stop)
    if first >= last:
        return ShardSlice(layer, 0, 0, FlatRange(0))
    return ShardSlice(layer, at + first - start, last - first, FlatRange(first - begin))


def tile(
    layers: Sequence[str | None], numels: Sequence[int], window: tuple[int, int]
) -> tuple[ShardSlice, ...]:
    """The slice in a window of each of the concatenated layers; None is padding."""
    slices, begin = [], 0
    for layer, numel in zip(layers, numels, strict=True):
        if layer is not None:
            slices.append(overlap(layer, begin, numel, window))
        begin += numel
    return tuple(slices)


def chunk(numel: int, rank: int, world: int) -> tuple[int, int]:
    """The window of `rank` if `numel` elements are cut into equal chunks, the last ones shorter."""
    size = -(-numel // world)
    return min(rank * size, numel), min((rank + 1) * size, numel)


def gather_whole(
    local: Tensor, piece: ShardSlice, shape: tuple[int, ...], groups: Sequence[ProcessGroup]
) -> Tensor:
    """The full layer, on the host, from the shards of the ranks of `groups`; collective."""
    full = torch.zeros(prod(shape), dtype=local.dtype, device=local.device)
    start = _start(piece)
    full[start : start + piece.numel] = local
    for group in groups:
        all_reduce_(full, group)
    return full.view(shape).cpu()


def take_piece(whole: Tensor, piece: ShardSlice) -> Tensor:
    """This rank's shard of a full layer, `[piece.numel]`."""
    start = _start(piece)
    return whole.reshape(-1)[start : start + piece.numel]


def _start(piece: ShardSlice) -> int:
    return piece.region.start if isinstance(piece.region, FlatRange) else 0
