"""One inner step: sums before and after the base optimizer, one reduction per scope, the rule, the pull."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharded_spd.binding import Binding, flat
from sharded_spd.errors import AnchorError, ConfigError
from sharded_spd.kernels.reference import pull_
from sharded_spd.layout import BoundShard
from sharded_spd.plan import Plan, RulePart
from sharded_spd.rules import Options, Stats
from sharded_spd.stats import DELTA_SQ, expand_rows, row_spans
from sharded_spd.sums import Item, Sums

_HAS_GRAD, _FOUND_INF, _HAS_STATE = 0, 1, 2


class Step:
    """One inner step under way: made right before the base optimizer steps, finished right after."""

    def __init__(
        self, plan: Plan, binding: Binding, optimizer: Optimizer, shards: Sequence[BoundShard]
    ) -> None:
        self._plan = plan
        self._binding = binding
        self._flags = torch.zeros(
            3 if plan.guarded else 2, len(plan.fqns), dtype=torch.float64, device=plan.device
        )
        self._read_scalars(optimizer, shards)
        self._items = self._make_items(optimizer, shards)
        self._edited: dict[int, tuple[Stats, dict[str, Tensor]]] = {}
        self._early()
        self._sums = Sums(plan, plan.keys(early=False))
        for item in self._items:
            wanted = [s for phase, s in item.part.keys(early=False) if phase == "before"]
            if item.piece.layer in plan.guarded and DELTA_SQ not in wanted:
                wanted.append(DELTA_SQ)
            if wanted:
                self._sums.add("before", item, wanted)
            if item.part.rule.spec.keeps_w:
                item.kept = flat(item.shard.tensor)[item.cut].clone()
        for p, part in enumerate(plan.parts):
            if part.rule.spec.when == "before":
                self._project(
                    p, part, self._edited[p][0] if p in self._edited else self._no_stats(part), self._flags
                )

    def finish(self) -> None:
        """Reduce, find s, pull.

        Raises:
            AnchorError: on all ranks alike, at the first real step, where weights were loaded after the
            snapshot.
        """
        for item in self._items:
            wanted = [s for phase, s in item.part.keys(early=False) if phase == "after"]
            if wanted:
                self._sums.add("after", item, wanted)
        self._sums.reduce(self._flags)
        if self._plan.guarded:
            self._check_guard()
        for p, part in enumerate(self._plan.parts):
            if part.rule.spec.when == "after" and part.rule.spec.pulls:
                earlier = self._edited[p][0] if p in self._edited else None
                stats = self._sums.stats(part, part.keys(early=False), earlier)
                self._project(p, part, stats, self._sums.flags)

    def _read_scalars(self, optimizer: Optimizer, shards: Sequence[BoundShard]) -> None:
        plan, options = self._plan, self._binding.options
        lr: list[Any] = [0.0] * len(plan.fqns)
        decay, limit, has_grad, has_state = list(lr), list(lr), list(lr), list(lr)
        for shard in shards:
            group = shard.param_group
            for piece in shard.slices:
                i, own = plan.column[piece.layer], options[piece.layer]
                lr[i] = group["lr"]
                decay[i] = group["weight_decay"] if own.weight_decay is None else own.weight_decay
                if not isinstance(decay[i], Tensor) and not decay[i] >= 0:
                    raise ConfigError(
                        f"layer {piece.layer!r}: got weight_decay {decay[i]}; wanted lambda >= 0"
                    )
                pull = group.get("max_pull") if own.max_pull is None else own.max_pull
                limit[i] = float("inf") if pull is None else pull
                has_grad[i] = float(shard.grad is not None)
                has_state[i] = float(shard.has_state)
        self._lr = plan.vectors["lr"].update(lr)
        self._weight_decay = plan.vectors["weight_decay"].update(decay)
        self._max_pull = plan.vectors["max_pull"].update(limit)
        self._flags[_HAS_GRAD] = plan.vectors["has_grad"].update(has_grad)
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            self._flags[_FOUND_INF] = found_inf.to(plan.device, non_blocking=True)
        if plan.guarded:
            self._flags[_HAS_STATE] = plan.vectors["has_state"].update(has_state)

    def _make_items(self, optimizer: Optimizer, shards: Sequence[BoundShard]) -> list[Item]:
        grad_scale = getattr(optimizer, "grad_scale", None)
        items = []
        for shard in shards:
            if shard.grad is None:
                continue
            sign = -1.0 if shard.param_group.get("maximize", False) else 1.0
            factor = sign if grad_scale is None else sign / grad_scale.to(shard.grad.device, torch.float64)
            for piece in shard.slices:
                part, index = self._plan.part_of[piece.layer]
                spec = part.rule.spec
                if piece.numel == 0 or not spec.pulls:
                    continue
                column = self._plan.column[piece.layer]
                item = Item(shard, piece, part, index, column, factor, None, [], {})
                weight = flat(shard.tensor)[item.cut]
                if spec.anchored:
                    item.anchor = self._binding.anchor(piece, weight)
                if spec.granularity == "row" or part.has_row_stats:
                    item.spans = row_spans(piece, self._binding.layout.shapes[piece.layer])
                if spec.shard_state:
                    item.state = self._plan.shard_state(piece, weight, spec.shard_state)
                items.append(item)
        return items

    def _early(self) -> None:
        """Reduce what is needed ahead of the base step, and let the rules that edit gradients do so."""
        if not any(part.early for part in self._plan.parts):
            return
        sums = Sums(self._plan, self._plan.keys(early=True))
        for item in self._items:
            if item.part.early:
                sums.add("before", item, item.part.rule.spec.before)
        sums.reduce(self._flags[:2])
        for p, part in enumerate(self._plan.parts):
            if not part.early:
                continue
            stats, state = sums.stats(part, part.keys(early=True)), dict(part.state)
            self._edited[p] = (stats, state)
            if part.rule.spec.edits_grad:
                plan = part.rule.plan_edit(stats, state, self._options(part))
                self._edit(part, plan, self._active(part, stats, sums.flags))

    def _edit(self, part: RulePart, plan: Any, active: Tensor) -> None:
        for item in self._items:
            grad = item.shard.grad
            if item.part is not part or grad is None:
                continue
            flat_grad = flat(grad)
            own = {name: values[item.index] for name, values in plan.items()}
            for cut, block in item.blocks(grads=True):
                target = flat_grad[item.cut][cut]
                edited = part.rule.edit_grad(block, own) / item.grad_factor
                keep = ~active[item.index] | ~torch.isfinite(edited)
                target.copy_(torch.where(keep, target, edited.to(target.dtype)))
            if not grad.is_contiguous():
                grad.copy_(flat_grad.view(grad.shape))

    def _options(self, part: RulePart) -> Options:
        return Options(lr=self._lr[part.columns], weight_decay=self._weight_decay[part.columns])

    def _no_stats(self, part: RulePart) -> Stats:
        return Stats(before={}, row_lengths=part.row_lengths)

    def _active(self, part: RulePart, stats: Stats, flags: Tensor) -> Tensor:
        """Which of the part's layers really step: bool `[num_layers]`."""
        active = (flags[_HAS_GRAD] > 0) & (flags[_FOUND_INF] == 0) & (self._lr != 0)
        return active[part.columns] & self._finite(stats, part)

    @staticmethod
    def _finite(stats: Stats, part: RulePart) -> Tensor:
        finite = torch.ones_like(part.columns, dtype=torch.bool)
        for stat, value in [*stats.before.items(), *stats.after.items()]:
            total = stats.over_rows(value, "sum") if stat.per == "row" else value
            finite &= torch.isfinite(total)
        return finite

    def _project(self, p: int, part: RulePart, stats: Stats, flags: Tensor) -> None:
        """Find s of one rule's layers, advance its state, and pull."""
        rule, options = part.rule, self._options(part)
        active, limit = self._active(part, stats, flags), self._max_pull[part.columns]
        state = self._edited[p][1] if p in self._edited else dict(part.state)
        s = torch.zeros_like(options.lr)
        if rule.spec.granularity != "element":
            s = rule.shrink(stats, state, options)
        by_row = rule.spec.granularity == "row"
        may, most = (stats.to_rows(active), stats.to_rows(limit)) if by_row else (active, limit)
        s = torch.minimum(torch.where(may & torch.isfinite(s), s, 0.0), most)
        part.state = {name: torch.where(active, state[name], old) for name, old in part.state.items()}
        for item in self._items:
            if item.part is part:
                self._pull(item, stats, s, options, active, limit)
        per_layer = stats.over_rows(s, "max") if by_row else s
        self._plan.report(part, per_layer, self._report(part, stats, per_layer, flags))

    def _pull(
        self, item: Item, stats: Stats, s: Tensor, options: Options, active: Tensor, limit: Tensor
    ) -> None:
        i, rule = item.index, item.part.rule
        rows = item.part.row_ranges[i]
        tensor = item.shard.tensor
        weights = flat(tensor)
        if item.state:
            for cut, block in item.blocks(grads=False):
                new = rule.next_shard_state(block, stats, partial(_to_elements, item=item, cut=cut))
                for name, old in block.state.items():
                    old.copy_(torch.where(active[i], new[name].to(old.dtype), old))
        if rule.spec.granularity == "element":
            for cut, block in item.blocks(grads=False):
                each = rule.shrink_elements(block, options.lr[i], options.weight_decay[i])
                each = torch.where(active[i] & torch.isfinite(each), each, 0.0).clamp(max=limit[i])
                pull_(weights[item.cut][cut], block.anchor, each)
        else:
            own = expand_rows(s[rows], item.spans) if rule.spec.granularity == "row" else s[i]
            pull_(weights[item.cut], item.anchor, own)
        if not tensor.is_contiguous():
            tensor.copy_(weights.view(tensor.shape))

    def _report(self, part: RulePart, stats: Stats, s: Tensor, flags: Tensor) -> dict[str, Tensor]:
        stepped = (flags[_HAS_GRAD] > 0)[part.columns]
        report = {"nonfinite": stepped & ~self._finite(stats, part), **part.rule.telemetry(stats, s)}
        if DELTA_SQ in stats.after and part.rule.spec.granularity == "layer":
            report["deviation"] = stats.after[DELTA_SQ].sqrt() * (1 - s).abs()
        return report

    def _check_guard(self) -> None:
        """The only read on the host in a step: once, at the first real step after a snapshot."""
        plan, flags = self._plan, self._sums.flags
        real = (flags[_HAS_GRAD] > 0) & (flags[_FOUND_INF] == 0) & (self._lr != 0)
        moved = real & (flags[_HAS_STATE] == 0) & (self._sums.row(("before", DELTA_SQ)) > 0)
        names = [
            fqn for fqn, bad in zip(plan.fqns, moved.tolist(), strict=True) if bad and fqn in plan.guarded
        ]
        if names:
            raise AnchorError(
                f"{len(names)} layer(s) had left their anchor before the first step, {names[0]!r} for one: "
                "weights were loaded after the snapshot was taken; load the pre-trained weights first and "
                "then build the optimizer, or use anchor='deferred' and call bind() after loading, or "
                "anchor at a checkpoint's path"
            )
        if bool(real.any()):
            plan.guarded = set()


def _to_elements(per_row: Tensor, *, item: Item, cut: slice) -> Tensor:
    """A rule's values per row at each element of one chunk of a slice."""
    return expand_rows(per_row[item.part.row_ranges[item.index]], item.spans)[cut]
