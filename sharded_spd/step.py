"""One inner step: sums before and after the base optimizer, one reduction per scope, the rule, the pull."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharded_spd.batches import Batch
from sharded_spd.binding import Binding
from sharded_spd.errors import AnchorError
from sharded_spd.guard import DELTA, DOT, GUARD_STATISTICS, HAS_STATE, MOVED
from sharded_spd.items import Item
from sharded_spd.kernels import REFERENCE, Moments
from sharded_spd.kernels.reference import pull_, pull_back_
from sharded_spd.layout import BoundShard
from sharded_spd.plan import Plan, Reduction, RulePart, reduce_together_
from sharded_spd.roster import Roster
from sharded_spd.rules import Options, Stats
from sharded_spd.stats import DELTA_SQ, expand_rows, layer_sums
from sharded_spd.sums import Sums

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
        roster: Roster,
        optimizer: Optimizer,
        shards: Sequence[BoundShard],
        *,
        sums_later: bool = False,
    ) -> None:
        self._plan = plan
        self._roster = roster
        self._shards = shards
        self._binding = binding
        self._on_disk = binding.on_disk.intersection(plan.fqns)
        self._flags = torch.zeros(2, len(plan.fqns), dtype=torch.float64, device=plan.device)
        self._guarded = binding.unverified.among(plan.fqns)
        self._guard: Tensor | None = None
        self._with_grad: set[str] = set()
        if self._guarded:
            self._guard = torch.zeros(4, len(plan.fqns), dtype=torch.float64, device=plan.device)
            self._with_grad = {p.layer for s in shards if s.grad is not None for p in s.slices}
        self._read_scalars(optimizer, shards)
        self._items = self._line_up(optimizer, shards)
        self._edited: dict[int, tuple[Stats, dict[str, Tensor]]] = {}
        self._early()
        self._sums = Sums(plan, plan.keys(early=False))
        self._batches: list[Batch] = []
        self._stepped: set[int] = set()
        if not sums_later:
            self.add_before()

    def add_before(self) -> None:
        """Take the sums before the base step, of what has not been stepped with its sums."""
        rest = [i for i in self._items if id(i) not in self._stepped] if self._stepped else self._items
        around = self._roster.batches.of(rest, "around the base")
        for batch in around:
            if not batch.part.early:
                batch.add("before", self._sums)
        self._batches += around
        for item in rest:
            if item.part.rule.spec.keeps_w:
                item.kept = item.tensors.flat_weight().clone()
        for p, part in enumerate(self._plan.parts):
            if part.rule.spec.decays:
                self._decay(part)
            if part.rule.spec.when == "before":
                stats = self._edited[p][0] if p in self._edited else self._no_stats(part)
                self._project(p, part, stats, self._flags)

    def steppable(self) -> dict[Tensor, list[Item]]:
        """The items of each of the optimizer's tensors that a kernel may step together with their sums.

        That is, of all its elements, by rules that need nothing but the sums that such a kernel forms.
        """
        return {
            owner: items
            for owner, items in self._roster.wholes.items()
            if items[0].shard.grad is not None and all(item.backend is not REFERENCE for item in items)
        }

    def adam_(self, items: Sequence[Item], moments: Sequence[Moments], numbers: Tensor) -> None:
        """Step items of `steppable` as Adam does (modified in place), with their sums; see `Table.adam_`."""
        found = self._roster.batches.of(items, "with Adam")
        places = {id(item): i for i, item in enumerate(items)} if len(found) > 1 else {}
        for batch in found:
            at = [places[id(item)] for item in batch.items] if places else range(len(items))
            own = numbers[torch.tensor(at, device=numbers.device)] if places else numbers
            batch.adam_([moments[i] for i in at], own, self._sums)
        self._batches += found
        self._stepped = {id(item) for item in items}

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
        self._roster.after_base(self._items)
        for batch in self._batches:
            if id(batch.items[0]) not in self._stepped:
                batch.add("after", self._sums)
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
        self._roster.let_go(self._items)

    def _check_files(self) -> None:
        """Raise on all ranks what one of them saw. Waits for the device."""
        for fqn, count in zip(self._plan.fqns, self._sums.flags[_FOUND_INF].tolist(), strict=True):
            if count >= _LOST:
                source = getattr(self._binding.options[fqn].anchor, "source", "")
                why = self._roster.lost.get(fqn, f"its anchor on disk, {source}, has changed")
                raise AnchorError(f"layer {fqn!r}: {why} (seen on {count // _LOST:.0f} rank(s))")

    def _settle(self, guard: Tensor) -> None:
        if self._guarded.isdisjoint(self._with_grad):
            return  # nothing to decide, so the host need not wait
        has_grad, found_inf = self._sums.flags
        scopes = [scope.fqns for scope in self._plan.scopes]
        self._binding.unverified.settle(
            self._plan.fqns, scopes, guard, has_grad=has_grad, found_inf=found_inf, lr=self._lr
        )

    def _read_scalars(self, optimizer: Optimizer, shards: Sequence[BoundShard]) -> None:
        scalars = self._roster.scalars
        self._lr, self._weight_decay, self._max_pull = scalars.read()
        self._moves = scalars.moves(shards)
        self._flags[_HAS_GRAD] = scalars.has_grad(shards)
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            self._flags[_FOUND_INF] = found_inf.to(self._plan.device, non_blocking=True)
        if self._guard is not None:
            self._guard[HAS_STATE] = scalars.has_state(shards)

    def _line_up(self, optimizer: Optimizer, shards: Sequence[BoundShard]) -> list[Item]:
        items = self._roster.line_up(shards, getattr(optimizer, "grad_scale", None))
        if self._on_disk:
            lost = self._roster.lost
            missing = [_LOST if fqn in lost else 0.0 for fqn in self._plan.fqns]
            self._flags[_FOUND_INF] += self._plan.vectors["lost"].update_numbers(missing)
        if self._guard is not None:
            for item in items:
                if item.piece.layer in self._guarded and item.part.rule.spec.anchored:
                    self._watch(self._guard, item)
        return items

    @staticmethod
    def _watch(guard: Tensor, item: Item) -> None:
        """Add one slice to the guard's rows."""
        for row, value in zip(
            (DELTA, DOT), layer_sums((b for _, b in item.blocks(grads=True)), GUARD_STATISTICS), strict=True
        ):
            guard[row, item.column] += value.to(guard.device)
        guard[MOVED, item.column] += float(item.moved)

    def _early(self) -> None:
        """Reduce what is needed ahead of the base step, and let the rules that edit gradients do so."""
        if not any(part.early for part in self._plan.parts):
            return
        sums = Sums(self._plan, self._plan.keys(early=True))
        for batch in self._roster.batches.of([item for item in self._items if item.part.early], "early"):
            batch.add("before", sums)
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
            grad, flat_grad = item.shard.grad, item.tensors.flat_grad()
            if item.part is not part or grad is None or flat_grad is None:
                continue
            own = {name: values[item.index] for name, values in plan.items()}
            for cut, block in item.blocks(grads=True):
                target = flat_grad[cut]
                edited = part.rule.edit_grad(block, own) / item.tensors.grad_factor
                keep = ~active[item.index] | ~torch.isfinite(edited)
                target.copy_(torch.where(keep, target, edited.to(target.dtype)))
            if not grad.is_contiguous() and item.tensors.grad is not None:
                grad.copy_(item.tensors.grad.view(grad.shape))

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
        if rule.spec.granularity == "layer" and not rule.spec.shard_state:
            for batch in self._batches:
                if batch.part is part:
                    batch.pull_(s)
        else:
            for item in self._items:
                if item.part is part:
                    self._pull(item, stats, s, options, active, limit)
        per_layer = stats.over_rows(s, "max").clamp(min=0.0) if by_row else s
        if rule.spec.granularity == "element" or rule.spec.edits_grad:
            per_layer = torch.full_like(s, torch.nan)  # what it did is no number per layer
        self._plan.report(part, per_layer, self._report(part, stats, per_layer, flags))

    def _decay(self, part: RulePart) -> None:
        """AdamW's decay of the layers whose strength is their param group's own."""
        s = self._options(part).lr * self._options(part).weight_decay
        active = self._active(part, self._no_stats(part), self._flags)
        own = [self._binding.options[fqn].weight_decay is None for fqn in part.fqns]
        s = torch.where(active & torch.tensor(own, device=s.device) & torch.isfinite(s), s, 0.0)
        for item in self._items:
            if item.part is part:
                pull_(item.tensors.flat_weight(), None, s[item.index])
                item.write_back()

    def _pull(
        self, item: Item, stats: Stats, s: Tensor, options: Options, active: Tensor, limit: Tensor
    ) -> None:
        i, rule = item.index, item.part.rule
        weight, anchor = item.tensors.flat_weight(), item.tensors.anchor
        if item.state:
            for cut, block in item.blocks(grads=False):
                new = rule.next_shard_state(block, stats, partial(_to_elements, item=item, cut=cut))
                for name, old in block.state.items():
                    old.copy_(torch.where(active[i], new[name].to(old.dtype), old))
        if rule.spec.granularity == "element":
            for cut, block in item.blocks(grads=False):
                each = rule.shrink_elements(block, options.lr[i], options.weight_decay[i])
                each = torch.where(active[i] & torch.isfinite(each), each, 0.0).clamp(max=limit[i])
                if rule.spec.pulls_kept:
                    pull_back_(weight[cut], each * block.kept_delta)
                else:
                    pull_(weight[cut], block.anchor, each)
        elif rule.spec.granularity == "row":
            for cut, block in item.blocks(grads=False):
                pull_(weight[cut], block.anchor, _to_elements(s, item=item, cut=cut))
        else:
            pull_(weight, anchor, s[i])
        item.write_back()

    def _report(self, part: RulePart, stats: Stats, s: Tensor, flags: Tensor) -> dict[str, Tensor]:
        stepped = (flags[_HAS_GRAD] > 0)[part.columns]
        report = {"nonfinite": stepped & ~self._finite(stats, part), **part.rule.telemetry(stats, s)}
        if DELTA_SQ in stats.after and part.rule.spec.granularity == "layer":
            now = stats.after[DELTA_SQ].sqrt() * (1 - s).abs()
            report["deviation"] = torch.where(stepped, now, torch.nan)
        return report


def _to_elements(per_row: Tensor, *, item: Item, cut: slice) -> Tensor:
    """A rule's values per row at each element of one chunk of a slice."""
    return expand_rows(per_row[item.part.row_ranges[item.index]], item.spans, cut.start, cut.stop)
