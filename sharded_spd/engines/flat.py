"""What one tensor of an optimizer holds of the model's layers, and the arithmetic of flat tensors.

A flat engine lays layers one after the other, pads, and gives each rank a window of that.
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
    """What one tensor of the optimizer, of `numel` elements on this rank, holds of the model.

    `shapes` are those of the whole layers, one per slice. `split` are the groups that split the layers,
    `groups` these and those of replicas. `flat`: the tensor has not the layers' own dims. `local` gives what
    the optimizer updates where a wrapper may have put something else in the tensor's place.
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
    """What a window `[start, stop)` holds of a layer that lies at `[begin, begin + numel)`.

    `at` is where the window itself begins in the tensor. Nothing in common is a slice of no elements.
    """
    start, stop = window
    first, last = max(begin, start), min(begin + numel, stop)
    if first >= last:
        return ShardSlice(layer, 0, 0, FlatRange(0))
    return ShardSlice(layer, at + first - start, last - first, FlatRange(first - begin))


def tile(
    layers: Sequence[str | None], numels: Sequence[int], window: tuple[int, int]
) -> tuple[ShardSlice, ...]:
    """What a window holds of each of the layers that lie one after the other; None is padding."""
    slices, begin = [], 0
    for layer, numel in zip(layers, numels, strict=True):
        if layer is not None:
            slices.append(overlap(layer, begin, numel, window))
        begin += numel
    return tuple(slices)


def chunk(numel: int, rank: int, world: int) -> tuple[int, int]:
    """The window of `rank` where `numel` elements are cut into equal chunks, the last ones cut short."""
    size = -(-numel // world)
    return min(rank * size, numel), min((rank + 1) * size, numel)


def gather_whole(
    local: Tensor, piece: ShardSlice, shape: tuple[int, ...], groups: Sequence[ProcessGroup]
) -> Tensor:
    """The whole layer, on the host, from what each rank of `groups` holds of it; collective."""
    whole = torch.zeros(prod(shape), dtype=local.dtype, device=local.device)
    start = _start(piece)
    whole[start : start + piece.numel] = local
    for group in groups:
        all_reduce_(whole, group)
    return whole.view(shape).cpu()


def take_piece(whole: Tensor, piece: ShardSlice) -> Tensor:
    """This rank's part of a whole layer, `[piece.numel]`."""
    start = _start(piece)
    return whole.reshape(-1)[start : start + piece.numel]


def _start(piece: ShardSlice) -> int:
    return piece.region.start if isinstance(piece.region, FlatRange) else 0
