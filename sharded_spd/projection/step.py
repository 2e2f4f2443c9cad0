"""One inner step: sums before and after the base optimizer, one reduction per scope, the rule, the pull."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharded_spd.binding.checks import (
    DELTA,
    DOT,
    GUARD_STATISTICS,
    HAS_STATE,
    MOVED,
    NUM_ROWS,
    look_for_training_,
)
from sharded_spd.binding.records import Binding, has_strength
from sharded_spd.errors import AnchorError
from sharded_spd.kernels import REFERENCE, Moments
from sharded_spd.kernels.reference import pull_, pull_back_
from sharded_spd.projection.items import Item
from sharded_spd.projection.kernel_batches import Batch
from sharded_spd.projection.layers import ABSENT, FAILED, Plan, Reduction, RulePart
from sharded_spd.projection.roster import Roster
from sharded_spd.projection.sums import Sums
from sharded_spd.projection.verdict import Evidence
from sharded_spd.rules import Options, Stats
from sharded_spd.rules.rows import expand_rows
from sharded_spd.rules.statistics import DELTA_SQ, layer_sums
from sharded_spd.sharding.layout import BoundShard

_HAS_GRAD, _FOUND_INF = 0, 1
"""Rows of the flags: ranks with a gradient, with an overflow (or a failure)."""


class Step:
    """One inner step under way: made right before the base optimizer steps, finished right after.

    Its reductions have the same shape on all ranks, whatever one of them finds: what fails between them
    (`trying`) is kept as `failure` and told to the others in the next one, in which all ranks take part.
    """

    def __init__(self, plan: Plan, binding: Binding, optimizer: Optimizer) -> None:
        self.plan = self._plan = plan
        self._binding = binding
        self.optimizer = optimizer
        self.failure: Exception | None = None
        """What this rank could not do."""
        self.absent = False
        """Whether `failure` is that this rank takes no step at all."""
        self.base_decays: Set[int] = frozenset()
        """The ids of the param groups whose decay the base step does itself."""
        self._flags = torch.zeros(2, len(plan.fqns), dtype=torch.float64, device=plan.device)
        self._guarded = binding.unverified.among(plan.fqns)
        self._guard: Tensor | None = None
        if self._guarded:
            self._guard = torch.zeros(NUM_ROWS, len(plan.fqns), dtype=torch.float64, device=plan.device)
        self._roster: Roster | None = None
        self._shards: Sequence[BoundShard] = ()
        self._items: list[Item] = []
        self._moves = self._scaled = False
        self._edited: dict[int, tuple[Stats, dict[str, Tensor]]] = {}
        self._early = Sums(plan, plan.keys(early=True)) if any(part.early for part in plan.parts) else None
        self._sums = Sums(plan, plan.keys(early=False))
        self._batches: list[Batch] = []
        self._stepped: set[int] = set()
        self.starts = self._early is not None
        """Whether a reduction comes before the base step, and has not been yet."""

    @contextmanager
    def trying(self) -> Iterator[None]:
        """What fails inside is kept as `failure`; nothing is projected then."""
        try:
            yield
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception, *, absent: bool = False) -> None:
        """Take part in what is left of the step without anything to give."""
        if self.failure is None:
            self.failure, self.absent = error, absent
        if self._roster is not None:
            self._roster.let_go(self._roster.items)
        self._items, self._batches = [], []
        self._flags[_FOUND_INF] = 1.0  # so that ranks that hear of it late pull nothing

    def prepare(self, roster: Roster, shards: Sequence[BoundShard]) -> None:
        """Read the scalars, line up what has a gradient, and take the sums that are needed first."""
        self._roster, self._shards = roster, shards
        self._read_scalars(roster, shards)
        self._items = self._line_up(roster, shards)
        if self._early is not None:
            early = [item for item in self._items if item.part.early]
            for batch in roster.batches.of(early, "early"):
                batch.add("before", self._early)

    @property
    def meets(self) -> bool:
        """Whether a reduction is to come, in which the ranks meet."""
        return (self.starts and self.early_reduction().travels) or self.reduction().travels

    def early_reduction(self) -> Reduction:
        """What is to be reduced ahead of the base step, where `starts`."""
        if self._early is None:
            raise RuntimeError("no rule of this step asks for sums ahead of the base step")
        return self._early.reduction(self._flags, **self._told())

    def edit(self) -> None:
        """Let the rules that edit gradients do so, from the reduced early sums."""
        for p, part in enumerate(self._plan.parts):
            if not part.early or self._early is None:
                continue
            stats, state = self._early.stats(part, part.keys(early=True)), dict(part.state)
            self._edited[p] = (stats, state)
            if part.rule.spec.edits_grad:
                plan = part.rule.plan_edit(stats, state, self._options(part))
                self._edit(part, plan, self._active(part, stats, self._early.flags))

    def add_before(self) -> None:
        """Take the sums before the base step, of what has not been stepped with its sums."""
        if self._roster is None or self.failure is not None:
            return
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
        if self._roster is None or self.failure is not None:
            return {}
        return {
            owner: items
            for owner, items in self._roster.wholes.items()
            if items[0].shard.grad is not None
            and all(item.backend is not REFERENCE and self._pulls(item) for item in items)
        }

    def _pulls(self, item: Item) -> bool:
        """Whether there is a strength; else the base's own step is asked for, to the last bit."""
        return has_strength(self._binding.options[item.piece.layer], item.shard.param_group)

    def adam_(self, items: Sequence[Item], moments: Sequence[Moments], numbers: Tensor) -> None:
        """Step items of `steppable` as Adam does (modified in place), with their sums; see `Table.adam_`."""
        if self._roster is None:
            return
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

    @property
    def skipped(self) -> Tensor | None:
        """Whether a scaler has the base skip the step, of each layer, once reduced; None without a scaler."""
        return self._sums.flags[_FOUND_INF] > 0 if self._scaled else None

    def add_after(self) -> None:
        """Take the sums after the base step; let go of the gradients."""
        if self._roster is not None:
            self._roster.after_base(self._items)
        for batch in self._batches:
            if id(batch.items[0]) not in self._stepped:
                batch.add("after", self._sums)

    def reduction(self) -> Reduction:
        """What is to be reduced after the base step."""
        return self._sums.reduction(
            self._flags,
            guard=self._guard,
            guarded=self._guarded,
            # Word of a failure after the early reduction has no other way to the other ranks.
            always=self._early is not None or not self._binding.on_disk.isdisjoint(self._plan.fqns),
            **self._told(),
        )

    def _told(self) -> dict[str, Any]:
        trouble = 0.0 if self.failure is None else ABSENT if self.absent else FAILED
        checksums = self._roster.scalars.checksums if self._roster is not None else ()
        return {"trouble": trouble, "checksums": checksums}

    @property
    def settings(self) -> Mapping[str, Any]:
        """The step's scalars by name."""
        return self._roster.scalars.settings() if self._roster is not None else {}

    def evidence(self) -> Evidence | None:
        """What the guard has to look at, once it is reduced."""
        if self._guard is None or self.failure is not None:
            return None
        groups = {piece.layer: shard.param_group for shard in self._shards for piece in shard.slices}
        wanted = frozenset(f for f in self._plan.fqns if has_strength(self._binding.options[f], groups[f]))
        if self._binding.unverified.fresh.isdisjoint(self._plan.fqns) and wanted.isdisjoint(self._guarded):
            return None  # what rests has nothing to be looked at
        rows = torch.cat([self._guard, self._sums.flags, self._lr.view(1, -1)])
        return Evidence(self._plan.fqns, [scope.fqns for scope in self._plan.scopes], rows, wanted)

    def project(self) -> None:
        """Find s from the reduced sums, and pull."""
        for p, part in enumerate(self._plan.parts):
            if part.rule.spec.when == "after" and part.rule.spec.pulls:
                earlier = self._edited[p][0] if p in self._edited else None
                stats = self._sums.stats(part, part.keys(early=False), earlier)
                self._project(p, part, stats, self._sums.flags)

    def release(self) -> None:
        """Let go of the weights, which the engine may move or free now."""
        if self._roster is not None:
            self._roster.let_go(self._items)

    def _read_scalars(self, roster: Roster, shards: Sequence[BoundShard]) -> None:
        scalars = roster.scalars
        self._plan.frozen = {
            p.layer for s in shards if not s.requires_grad and s.grad is None for p in s.slices
        }
        self._lr, self._weight_decay, self._max_pull = scalars.read()
        self._moves = scalars.moves(shards)
        self._flags[_HAS_GRAD] = scalars.has_grad(shards)
        found_inf = getattr(self.optimizer, "found_inf", None)
        self._scaled = found_inf is not None
        if found_inf is not None:
            self._flags[_FOUND_INF] = found_inf.to(self._plan.device, non_blocking=True)
        if self._guard is not None:
            self._guard[HAS_STATE] = scalars.has_state(shards)
            if self._binding.unverified.foreign:
                unseen = self._binding.unverified.fresh - self._binding.unverified.stepped
                look_for_training_(self._guard, self.optimizer, shards, self._plan.column, unseen)

    def _line_up(self, roster: Roster, shards: Sequence[BoundShard]) -> list[Item]:
        items = roster.line_up(shards, getattr(self.optimizer, "grad_scale", None))
        for fqn, why in roster.lost.items():
            raise AnchorError(f"layer {fqn!r}: {why}")
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
        if self.base_decays and rule.spec.when == "before" and not rule.spec.decays:
            s = torch.where(self._decayed_by_base(part), 0.0, s)
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

    def _decayed_by_base(self, part: RulePart) -> Tensor:
        groups = {piece.layer: id(shard.param_group) for shard in self._shards for piece in shard.slices}
        return torch.tensor([groups[fqn] in self.base_decays for fqn in part.fqns], device=self._plan.device)

    def _decay(self, part: RulePart) -> None:
        """AdamW's decay of the layers whose strength is their param group's own."""
        s = self._options(part).lr * self._options(part).weight_decay
        active = self._active(part, self._no_stats(part), self._flags)
        own = [self._binding.options[fqn].weight_decay is None for fqn in part.fqns]
        s = torch.where(active & torch.tensor(own, device=s.device) & torch.isfinite(s), s, 0.0)
        if self.base_decays:
            s = torch.where(self._decayed_by_base(part), 0.0, s)
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
