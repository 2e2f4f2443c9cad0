"""One inner step: sums before and after the base optimizer, one reduction per scope, the rule, the pull."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharded_spd.binding import Binding, flat, lost
from sharded_spd.engines.dtensor import local_tensor
from sharded_spd.errors import AnchorError
from sharded_spd.guard import DELTA, DOT, GUARD_STATISTICS, HAS_STATE, MOVED
from sharded_spd.kernels.reference import pull_
from sharded_spd.layout import BoundShard
from sharded_spd.options import check_scalars
from sharded_spd.plan import Phase, Plan, Reduction, RulePart, reduce_together_
from sharded_spd.prefetch import ahead
from sharded_spd.rules import Options, Stats
from sharded_spd.stats import DELTA_SQ, expand_rows, layer_sums, row_spans
from sharded_spd.sums import Item, Sums, can_fuse

_HAS_GRAD, _FOUND_INF = 0, 1
"""Rows of the flags: ranks with a gradient, with an overflow."""

_LOST = 2.0**20
"""What a rank that has lost the file of an anchor on disk adds to the overflows, more than there are ranks: a
row of its own would change the order in which the statistics are added up, and so their last bits."""


class Step:
    """One inner step under way: made right before the base optimizer steps, finished right after."""

    def __init__(
        self,
        plan: Plan,
        binding: Binding,
        optimizer: Optimizer,
        shards: Sequence[BoundShard],
        *,
        sums_later: bool = False,
    ) -> None:
        self._plan = plan
        self._shards = shards
        self._binding = binding
        self._on_disk = binding.on_disk.intersection(plan.fqns)
        self._flags = torch.zeros(2, len(plan.fqns), dtype=torch.float64, device=plan.device)
        self._guarded = binding.unverified.among(plan.fqns)
        self._guard: Tensor | None = None
        if self._guarded:
            self._guard = torch.zeros(4, len(plan.fqns), dtype=torch.float64, device=plan.device)
        self._read_scalars(optimizer, shards)
        self._items = self._make_items(optimizer, shards)
        self._edited: dict[int, tuple[Stats, dict[str, Tensor]]] = {}
        self._early()
        self._sums = Sums(plan, plan.keys(early=False))
        self._fused: set[int] = set()
        if not sums_later:
            self.add_before()
        for item in self._items:
            if item.part.rule.spec.keeps_w:
                item.kept = flat(item.shard.tensor)[item.cut].clone()
        for p, part in enumerate(plan.parts):
            if part.rule.spec.when == "before":
                stats = self._edited[p][0] if p in self._edited else self._no_stats(part)
                self._project(p, part, stats, self._flags)

    def add_before(self) -> None:
        """Take the sums before the base step, of what has not been stepped with its sums."""
        self._add("before")

    def whole_items(self) -> dict[Tensor, list[Item]]:
        """The items of each of the optimizer's tensors that a kernel may step together with their sums.

        That is, of all its elements, by rules that need nothing but the sums that such a kernel forms.
        """
        found: dict[Tensor, list[Item]] = {}
        covered: dict[Tensor, int] = {}
        for item in self._items:
            owner, spec = item.shard.owner, item.part.rule.spec
            plain = not (spec.keeps_w or spec.edits_grad or spec.shard_state or item.part.has_row_stats)
            if owner is not None and plain and spec.when == "after" and can_fuse(spec):
                found.setdefault(owner, []).append(item)
                covered[owner] = covered.get(owner, 0) + item.piece.numel
        return {
            owner: items for owner, items in found.items() if covered[owner] == items[0].shard.tensor.numel()
        }

    def add_fused(self, items: Sequence[Item], rows: Tensor) -> None:
        """Take over the sums `[num_items, 3]` of items that were stepped: <g, d>, |d|^2, |d|^2 after it."""
        self._sums.add_fused(items, rows)
        self._fused = {id(item) for item in items}

    def _add(self, phase: Phase) -> None:
        keys = {p: part.keys(early=False) for p, part in enumerate(self._plan.parts)}
        own = {id(part): [s for at, s in keys[p] if at == phase] for p, part in enumerate(self._plan.parts)}
        wanted = [(item, own[id(item.part)]) for item in self._items if id(item) not in self._fused]
        self._sums.add_all(phase, [(item, stats) for item, stats in wanted if stats])

    @property
    def moves(self) -> bool:
        """Whether any layer has a gradient and a learning rate, as far as the host can tell."""
        return self._moves

    @property
    def shards(self) -> Sequence[BoundShard]:
        """What the base optimizer stepped."""
        return self._shards

    def collect(self) -> Reduction:
        """Take the sums after the base step; let go of the gradients. What comes back is to be reduced."""
        self._shards = [_as_it_is_now(shard) for shard in self._shards]
        for item in self._items:
            item.shard = self._shards[item.position]
        self._add("after")
        return self._sums.reduction(
            self._flags, guard=self._guard, guarded=self._guarded, always=bool(self._on_disk)
        )

    def project(self) -> None:
        """Find s from the reduced sums, and pull.

        Raises:
            AnchorError: on all ranks alike, where a layer had left its anchor before its first step, or the
                file of an anchor on disk has changed.
        """
        if self._on_disk:
            self._check_files()
        if self._guard is not None:
            self._settle(self._guard)
        for p, part in enumerate(self._plan.parts):
            if part.rule.spec.when == "after" and part.rule.spec.pulls:
                earlier = self._edited[p][0] if p in self._edited else None
                stats = self._sums.stats(part, part.keys(early=False), earlier)
                self._project(p, part, stats, self._sums.flags)

    def _check_files(self) -> None:
        """Raise on all ranks what one of them saw. Waits for the device."""
        for fqn, count in zip(self._plan.fqns, self._sums.flags[_FOUND_INF].tolist(), strict=True):
            if count >= _LOST:
                source = getattr(self._binding.options[fqn].anchor, "source", "")
                raise AnchorError(
                    f"layer {fqn!r}: {self._lost.get(fqn, f'its anchor on disk, {source}, has changed')} "
                    f"(seen on {count // _LOST:.0f} rank(s))"
                )

    def _settle(self, guard: Tensor) -> None:
        if self._guarded.isdisjoint(self._with_grad):
            return  # nothing to decide, so the host need not wait
        has_grad, found_inf = self._sums.flags
        scopes = [scope.fqns for scope in self._plan.scopes]
        self._binding.unverified.settle(
            self._plan.fqns, scopes, guard, has_grad=has_grad, found_inf=found_inf, lr=self._lr
        )

    def _read_scalars(self, optimizer: Optimizer, shards: Sequence[BoundShard]) -> None:
        plan, options = self._plan, self._binding.options
        lr: list[Any] = [0.0] * len(plan.fqns)
        decay, limit, has_grad, has_state = list(lr), list(lr), list(lr), list(lr)
        for shard in shards:
            group = shard.param_group
            for piece in shard.slices:
                i, own = plan.column[piece.layer], options[piece.layer]
                lr[i] = group.get("lr")
                decay[i] = group["weight_decay"] if own.weight_decay is None else own.weight_decay
                pull = group.get("max_pull") if own.max_pull is None else own.max_pull
                limit[i] = float("inf") if pull is None else pull
                has_grad[i] = float(shard.grad is not None)
                has_state[i] = float(shard.has_state)
                check_scalars(piece.layer, lr[i], decay[i], limit[i])
        self._with_grad = {fqn for fqn, g in zip(plan.fqns, has_grad, strict=True) if g}
        self._moves = any(g and (isinstance(x, Tensor) or x != 0) for g, x in zip(has_grad, lr, strict=True))
        self._lr = plan.vectors["lr"].update(lr)
        self._weight_decay = plan.vectors["weight_decay"].update(decay)
        self._max_pull = plan.vectors["max_pull"].update(limit)
        self._flags[_HAS_GRAD] = plan.vectors["has_grad"].update(has_grad)
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            self._flags[_FOUND_INF] = found_inf.to(plan.device, non_blocking=True)
        if self._guard is not None:
            self._guard[HAS_STATE] = plan.vectors["has_state"].update(has_state)

    def _make_items(self, optimizer: Optimizer, shards: Sequence[BoundShard]) -> list[Item]:
        grad_scale = getattr(optimizer, "grad_scale", None)
        items = []
        self._lost: dict[str, str] = {}
        for position, shard in enumerate(shards):
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
                item = Item(position, shard, piece, part, index, column, factor, None, [], {})
                weight = flat(shard.tensor)[item.cut]
                if spec.anchored:
                    item.anchor, moved = self._binding.take(piece, weight)
                    changed = lost(item.anchor)
                    if changed is not None:
                        self._lost[piece.layer], item.anchor = changed, None
                    if self._guard is not None and piece.layer in self._guarded:
                        self._watch(self._guard, item, moved)
                if spec.granularity == "row" or part.has_row_stats:
                    item.spans = row_spans(piece, self._binding.layout.shapes[piece.layer])
                item.state = self._plan.shard_states.get(piece.layer, {})
                items.append(item)
        if self._on_disk:
            missing = [_LOST if fqn in self._lost else 0.0 for fqn in self._plan.fqns]
            self._flags[_FOUND_INF] += self._plan.vectors["lost"].update(missing)
        near = ahead([(item.anchor, item.shard.tensor.device) for item in items])
        for item, anchor in zip(items, near, strict=True):
            item.anchor = anchor
        return items

    @staticmethod
    def _watch(guard: Tensor, item: Item, moved: bool) -> None:
        """Add one slice to the guard's rows."""
        for row, value in zip(
            (DELTA, DOT), layer_sums((b for _, b in item.blocks(grads=True)), GUARD_STATISTICS), strict=True
        ):
            guard[row, item.column] += value.to(guard.device)
        guard[MOVED, item.column] += float(moved)

    def _early(self) -> None:
        """Reduce what is needed ahead of the base step, and let the rules that edit gradients do so."""
        if not any(part.early for part in self._plan.parts):
            return
        sums = Sums(self._plan, self._plan.keys(early=True))
        for item in self._items:
            if item.part.early:
                sums.add("before", item, item.part.rule.spec.before)
        reduce_together_([sums.reduction(self._flags)])
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
        s = torch.where(may & torch.isfinite(s), torch.minimum(s, most), 0.0)
        part.state = {name: torch.where(active, state[name], old) for name, old in part.state.items()}
        for item in self._items:
            if item.part is part:
                self._pull(item, stats, s, options, active, limit)
        per_layer = stats.over_rows(s, "max").clamp(min=0.0) if by_row else s
        self._plan.report(part, per_layer, self._report(part, stats, per_layer, flags))

    def _pull(
        self, item: Item, stats: Stats, s: Tensor, options: Options, active: Tensor, limit: Tensor
    ) -> None:
        i, rule = item.index, item.part.rule
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
        elif rule.spec.granularity == "row":
            for cut, block in item.blocks(grads=False):
                pull_(weights[item.cut][cut], block.anchor, _to_elements(s, item=item, cut=cut))
        else:
            pull_(weights[item.cut], item.anchor, s[i])
        if not tensor.is_contiguous():
            tensor.copy_(weights.view(tensor.shape))

    def _report(self, part: RulePart, stats: Stats, s: Tensor, flags: Tensor) -> dict[str, Tensor]:
        stepped = (flags[_HAS_GRAD] > 0)[part.columns]
        report = {"nonfinite": stepped & ~self._finite(stats, part), **part.rule.telemetry(stats, s)}
        if DELTA_SQ in stats.after and part.rule.spec.granularity == "layer":
            now = stats.after[DELTA_SQ].sqrt() * (1 - s).abs()
            report["deviation"] = torch.where(stepped, now, torch.nan)
        return report


def _as_it_is_now(shard: BoundShard) -> BoundShard:
    """Without its gradient, in the memory where a base that puts new tensors in place has left it."""
    if shard.owner is None:
        return replace(shard, grad=None)
    return replace(shard, grad=None, tensor=local_tensor(shard.owner))


def _to_elements(per_row: Tensor, *, item: Item, cut: slice) -> Tensor:
    """A rule's values per row at each element of one chunk of a slice."""
    return expand_rows(per_row[item.part.row_ranges[item.index]], item.spans, cut.start, cut.stop)
