"""One slice that a step projects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from sharded_spd.anchors.base import Values
from sharded_spd.kernels import REFERENCE, Backend, Slice
from sharded_spd.projection.layers import RulePart
from sharded_spd.rules.rows import RowSpan
from sharded_spd.rules.statistics import CHUNK, Block
from sharded_spd.sharding.layout import BoundShard, ShardSlice


@dataclass(slots=True, eq=False)
class Item:
    """One slice that may step, and where it stands in the plan and in its rule's part.

    `position` is that of its shard among the step's. `tensors` are those of now, the weight a copy where the
    shard's own is not contiguous; `backend` works on them. `values` are the anchor's, as they
    are bound; `settled` says whether they are (a frozen layer's are not before its first gradient), `moved`
    whether they turned out to be lost in this step.
    """

    position: int
    piece: ShardSlice
    part: RulePart
    index: int
    column: int
    shard: BoundShard
    tensors: Slice
    spans: list[RowSpan]
    state: dict[str, Tensor]
    backend: Backend = REFERENCE
    values: Values | None = None
    settled: bool = False
    moved: bool = False
    kept: Tensor | None = None

    def look(self) -> None:
        """Take the shard's weights; a 1-D copy of what is not contiguous (channels_last)."""
        tensor = self.shard.tensor
        self.tensors.weight = tensor if tensor.is_contiguous() else tensor.detach().reshape(-1)

    def write_back(self) -> None:
        """Hand changed weights to the shard, where they are a copy."""
        tensor = self.shard.tensor
        if not tensor.is_contiguous():
            tensor.copy_(self.tensors.weight.view(tensor.shape))

    def blocks(self, *, grads: bool) -> Iterator[tuple[slice, Block]]:
        """The slice in chunks, as the tensors are now."""
        own = self.tensors
        weight, grad = own.flat_weight(), own.flat_grad() if grads else None
        for begin in range(0, own.numel, CHUNK):
            cut = slice(begin, min(begin + CHUNK, own.numel))
            yield (
                cut,
                Block(
                    weight=weight[cut],
                    anchor=None if own.anchor is None else own.anchor[cut],
                    raw_grad=None if grad is None else grad[cut],
                    grad_factor=own.grad_factor,
                    kept=None if self.kept is None else self.kept[cut],
                    state={name: t[cut] for name, t in self.state.items()},
                ),
            )
