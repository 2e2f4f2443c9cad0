"""What of a plan is projected on this rank: items and scalars, kept from step to step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sharded_spd.anchors.mapped import MappedValues
from sharded_spd.binding.records import Binding, lost, rests
from sharded_spd.engines.dtensor import local_tensor
from sharded_spd.kernels import FORMED, Slice, choose
from sharded_spd.projection.hyperparams import Scalars
from sharded_spd.projection.items import Item
from sharded_spd.projection.kernel_batches import Batches
from sharded_spd.projection.layers import Plan
from sharded_spd.projection.prefetch import ahead
from sharded_spd.rules import RuleSpec
from sharded_spd.rules.rows import row_spans
from sharded_spd.rules.statistics import DELTA_SQ
from sharded_spd.sharding.layout import BoundShard

_GONE = BoundShard(torch.empty(0), None, (), {})


class Roster:
    """The items of a plan, while its shards are the same; between steps it holds none of their tensors."""

    def __init__(self, plan: Plan, binding: Binding, shards: Sequence[BoundShard]) -> None:
        self._binding = binding
        self._known = [(shard.slices, shard.param_group) for shard in shards]
        self.scalars = Scalars(plan, binding, shards)
        self.batches = Batches(plan.device)
        self.lost: dict[str, str] = {}
        """The layers whose anchor on disk cannot be read any more, and why."""
        self.items: list[Item] = []
        for position, piece in ((i, piece) for i, shard in enumerate(shards) for piece in shard.slices):
            part, index = plan.part_of[piece.layer]
            if piece.numel == 0 or not part.rule.spec.pulls:
                continue
            shard = shards[position]
            by_row = part.rule.spec.granularity == "row" or part.has_row_stats
            self.items.append(
                Item(
                    position,
                    piece,
                    part,
                    index,
                    plan.column[piece.layer],
                    shard,
                    Slice(_GONE.tensor, piece.offset, piece.numel, None),
                    row_spans(piece, binding.layout.shapes[piece.layer]) if by_row else [],
                    plan.shard_states.get(piece.layer, {}),
                    settled=not part.rule.spec.anchored,
                )
            )
        self.wholes = self._find_wholes()
        """The optimizer's tensors that a kernel may step with their sums, and the items that cover each."""
        for item in self.items:
            item.shard = _GONE

    def _find_wholes(self) -> dict[Tensor, list[Item]]:
        found: dict[Tensor, list[Item]] = {}
        for item in self.items:
            if item.shard.owner is not None and _needs_sums_only(item.part.rule.spec):
                found.setdefault(item.shard.owner, []).append(item)
        return {
            owner: items
            for owner, items in found.items()
            if sum(item.piece.numel for item in items) == items[0].shard.tensor.numel()
        }

    def fits(self, shards: Sequence[BoundShard]) -> bool:
        """Whether these are the shards that it was made of, or others just like them."""
        return len(shards) == len(self._known) and all(
            shard.slices is slices and shard.param_group is group
            for shard, (slices, group) in zip(shards, self._known, strict=True)
        )

    def line_up(self, shards: Sequence[BoundShard], grad_scale: Tensor | None) -> list[Item]:
        """The items that have a gradient, as they are now."""
        live = []
        factors: dict[tuple[int, torch.device], float | Tensor] = {}
        self.lost = {}
        for item in self.items:
            shard = shards[item.position]
            grad = shard.grad
            if grad is None or self._rests(item, shard):
                continue
            item.shard = shard
            item.look()
            own = item.tensors
            own.grad = grad if grad.is_contiguous() else grad.detach().reshape(-1)
            kind = (id(shard.param_group), grad.device)
            if kind not in factors:
                factors[kind] = _factor(shard, grad, grad_scale)
            own.grad_factor = factors[kind]
            if not item.settled:
                item.values, item.moved = self._binding.take(item.piece, own.flat_weight())
                own.anchor, item.settled = item.values, True
            values = item.values
            if isinstance(values, MappedValues):
                self._look_at_file(item, values)
            live.append(item)
        carried = ahead([(item.tensors.anchor, item.tensors.weight.device) for item in live])
        for item, anchor in zip(live, carried, strict=True):
            item.tensors.anchor = anchor
            item.backend = choose(item.tensors, self._binding.plain)
        return live

    def _rests(self, item: Item, shard: BoundShard) -> bool:
        """Whether its anchor was never asked for, and is not now."""
        return not item.settled and rests(self._binding.options[item.piece.layer], shard.param_group)

    def _look_at_file(self, item: Item, values: MappedValues) -> None:
        changed = lost(values)
        if changed is not None:
            self.lost[item.piece.layer], item.tensors.anchor = changed, None
            return
        whole = values.whole()
        item.tensors.anchor = values if whole is None else whole

    @staticmethod
    def after_base(live: Sequence[Item]) -> None:
        """Let go of the gradients, and look where a base that puts new tensors in place left the weights."""
        last = None
        for item in live:
            shard = item.shard
            if shard is not last:
                last = shard
                shard.grad = None
                if isinstance(shard.owner, DTensor):
                    shard.tensor = local_tensor(shard.owner)
            item.tensors.grad = None
            if item.tensors.weight is not shard.tensor:
                item.look()

    @staticmethod
    def let_go(live: Sequence[Item]) -> None:
        """Let go of the weights, which an engine may move or free until the next step."""
        for item in live:
            if item.shard.owner is not None:
                item.shard.tensor = item.shard.owner
            else:
                item.shard = _GONE
            item.tensors.weight, item.tensors.anchor = _GONE.tensor, item.values
            item.kept, item.moved = None, False


def _needs_sums_only(spec: RuleSpec) -> bool:
    """Whether a kernel that steps the weights forms all that a rule needs."""
    plain = not (spec.keeps_w or spec.edits_grad or spec.shard_state) and spec.granularity == "layer"
    formed = all(stat in FORMED for stat in spec.before) and set(spec.after) <= {DELTA_SQ}
    return plain and formed and spec.when == "after"


def _factor(shard: BoundShard, grad: Tensor, grad_scale: Tensor | None) -> float | Tensor:
    sign = -1.0 if shard.param_group.get("maximize", False) else 1.0
    if grad_scale is None:
        return sign
    scale = grad_scale.to(grad.device, torch.float64)
    return sign / (scale.item() if scale.device.type == "cpu" else scale)
