"""One inner step: sums before and after the base optimizer, one reduction per scope, the rule, the pull."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
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
from sharded_spd.binding.records import has_strength
from sharded_spd.errors import AnchorError
from sharded_spd.kernels.base import Moments
from sharded_spd.kernels.choose import REFERENCE
from sharded_spd.kernels.reference import pull_
from sharded_spd.projection.layers import RuleLayers
from sharded_spd.projection.pulls import SlicePull, edit_
from sharded_spd.projection.reduction import ABSENT, FAILED, Evidence, Reduction, Sums
from sharded_spd.projection.slices import KernelBatch, LocalSlice, LocalSlices, StepPlan
from sharded_spd.rules.base import Options, Stats
from sharded_spd.rules.statistics import DELTA_SQ, layer_sums
from sharded_spd.sharding.layout import BoundShard

_HAS_GRAD, _FOUND_INF = 0, 1
"""Rows of the flags: ranks with a gradient, with an overflow (or a failure)."""


class Step:
    """One inner step: `before` the base optimizer steps, the `reduction` after it, the `pull`.

    If a rule needs sums ahead of the base step (`starts`), they are reduced in between, and the rule may edit
    gradients. Reductions have the same shape on all ranks, whatever happens on one of them: an error between
    them is kept as `failure` and reported in the next one, in which all ranks take part.
    """

    def __init__(self, plan: StepPlan, optimizer: Optimizer) -> None:
        self.plan = plan
        self.optimizer = optimizer
        self._binding = binding = plan.binding
        self.failure: Exception | None = None
        """This rank's error."""
        self.absent = False
        """Whether `failure` means that this rank takes no step at all."""
        self.base_decays: Set[int] = frozenset()
        """The ids of the param groups that the base step decays itself."""
        self.shards: Sequence[BoundShard] = ()
        """What the base optimizer steps."""
        self.moves = False
        """Whether any layer has a gradient and a learning rate, as far as the host can tell."""
        self.starts = plan.early
        """Whether a reduction is still due before the base step."""
        self._flags = torch.zeros(2, len(plan.fqns), dtype=torch.float64, device=plan.device)
        unverified = binding.unverified
        any_left = unverified.fresh or unverified.pending
        self.guarded = unverified.among(plan.fqns) if any_left else set()
        """The layers not checked yet."""
        self._guard: Tensor | None = None
        if self.guarded:
            self._guard = torch.zeros(NUM_ROWS, len(plan.fqns), dtype=torch.float64, device=plan.device)
        self._local: LocalSlices | None = None
        self._live: list[LocalSlice] = []
        self._scaled = False
        self._edited: dict[int, tuple[Stats, dict[str, Tensor]]] = {}
        self._early = Sums(plan, plan.early_keys) if plan.early else None
        self._sums = Sums(plan, plan.late_keys)
        self._batches: list[KernelBatch] = []
        self._stepped: set[int] = set()

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Keep an error inside as `failure`; nothing is projected then."""
        try:
            yield
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception, *, absent: bool = False) -> None:
        """Keep `error`; this rank takes part in the rest of the step, but contributes nothing."""
        if self.failure is None:
            self.failure, self.absent = error, absent
        if self._local is not None:
            self._local.release()
        self._live, self._batches = [], []
        self._flags[_FOUND_INF] = 1.0  # so that ranks that learn of it late pull nothing

    def before(self, shards: Sequence[BoundShard]) -> None:
        """Read the scalars, gather what has a gradient, and take the sums that are needed first."""
        if self.failure is not None:
            return
        with self.trying():
            self.shards = shards
            self._local = local = self.plan.slices(shards)
            self._read_scalars(local, shards)
            self._live = self._gather_live(local, shards)
            if self._early is not None:
                early = [item for item in self._live if item.layers.early]
                for batch in local.batches.of(early, "early"):
                    batch.add("before", self._early)

    @property
    def meets(self) -> bool:
        """Whether a reduction is to come in which ranks meet."""
        return (self.starts and self.early_reduction().travels) or self.reduction().travels

    def early_reduction(self) -> Reduction:
        """What is to be reduced ahead of the base step, where `starts`."""
        if self._early is None:
            raise RuntimeError("no rule of this step asks for sums ahead of the base step")
        return self._early.reduction(self._flags, **self._told())

    def edit(self) -> None:
        """Let the rules that edit gradients do so, from the reduced early sums."""
        with self.trying():
            for layers in self.plan.rules if self._early is not None else ():
                if not layers.early or self._early is None:
                    continue
                stats, state = self._early.stats(layers, layers.early_keys), dict(layers.state)
                self._edited[layers.number] = (stats, state)
                if layers.rule.spec.edits_grad:
                    plan = layers.rule.plan_edit(stats, state, self._options(layers))
                    active = self._active(layers, stats, self._early.flags)
                    for item in self._live:
                        if item.layers is layers:
                            edit_(item, plan, active)

    def add_before(self) -> None:
        """Take the sums before the base step, except of slices that `adam_` has stepped."""
        if self._local is None or self.failure is not None:
            return
        with self.trying():
            rest = [i for i in self._live if id(i) not in self._stepped] if self._stepped else self._live
            around = self._local.batches.of(rest, "around the base") if rest else []
            for batch in around:
                if not batch.layers.early:
                    batch.add("before", self._sums)
            self._batches += around
            for item in rest:
                if item.layers.rule.spec.keeps_w:
                    item.kept = item.tensors.flat_weight().clone()
            for layers in self.plan.rules:
                if layers.rule.spec.decays:
                    self._decay(layers)
                if layers.rule.spec.when == "before":
                    earlier = self._edited.get(layers.number)
                    self._project(
                        layers, self._no_stats(layers) if earlier is None else earlier[0], self._flags
                    )

    def fusable(self) -> dict[Tensor, list[LocalSlice]]:
        """The slices of each of the optimizer's tensors that a kernel may step together with their sums.

        The slices must cover all its elements, their rules need only the sums that such a kernel forms, and
        they have a strength: without one, the step must equal the base's own to the last bit.
        """
        if self._local is None or self.failure is not None:
            return {}
        strong = self._local.hyperparams.has_strength
        return {
            owner: items
            for owner, items in self._local.fusable.items()
            if items[0].shard.grad is not None
            and all(item.backend is not REFERENCE and strong[item.column] for item in items)
        }

    def adam_(self, slices: Sequence[LocalSlice], moments: Sequence[Moments], numbers: Tensor) -> None:
        """Step slices of `fusable` as Adam does (modified in place), with their sums; see `Table.adam_`."""
        if self._local is None:
            return
        batches = self._local.batches.of(slices, "with Adam")
        places = {id(item): i for i, item in enumerate(slices)} if len(batches) > 1 else {}
        for batch in batches:
            at = [places[id(item)] for item in batch.slices] if places else range(len(slices))
            rows = numbers[torch.tensor(at, device=numbers.device)] if places else numbers
            batch.adam_([moments[i] for i in at], rows, self._sums)
        self._batches += batches
        self._stepped = {id(item) for item in slices}

    @property
    def skipped(self) -> Tensor | None:
        """Per layer, whether a scaler makes the base skip the step, once reduced; None without a scaler."""
        return self._sums.flags[_FOUND_INF] > 0 if self._scaled else None

    def add_after(self) -> None:
        """Take the sums after the base step; release the gradients."""
        with self.trying():
            if self._local is not None:
                self._local.after_base(self._live)
            for batch in self._batches:
                if id(batch.slices[0]) not in self._stepped:
                    batch.add("after", self._sums)

    def reduction(self) -> Reduction:
        """What is to be reduced after the base step."""
        return self._sums.reduction(
            self._flags,
            guard=self._guard,
            guarded=self.guarded,
            always=self.plan.meets_always,
            **self._told(),
        )

    def _told(self) -> dict[str, Any]:
        trouble = 0.0 if self.failure is None else ABSENT if self.absent else FAILED
        checksums = self._local.hyperparams.checksums if self._local is not None else ()
        return {"trouble": trouble, "checksums": checksums}

    def settings(self) -> Mapping[str, Any]:
        """The step's scalars by name."""
        return self._local.hyperparams.settings() if self._local is not None else {}

    def evidence(self) -> Evidence | None:
        """What the guard checks, once it is reduced."""
        if self._guard is None or self.failure is not None:
            return None
        groups = {piece.layer: shard.param_group for shard in self.shards for piece in shard.slices}
        fqns, options = self.plan.fqns, self._binding.options
        wanted = frozenset(fqn for fqn in fqns if has_strength(options[fqn], groups[fqn]))
        if self._binding.unverified.fresh.isdisjoint(fqns) and wanted.isdisjoint(self.guarded):
            return None  # layers at rest need no check
        rows = torch.cat([self._guard, self._sums.flags, self._scalars.lr.view(1, -1)])
        return Evidence(fqns, [scope.fqns for scope in self.plan.scopes], rows, wanted)

    def pull(self) -> None:
        """Find s from the reduced sums, and pull."""
        for layers in self.plan.rules:
            if layers.rule.spec.when == "after" and layers.rule.spec.pulls:
                earlier = self._edited.get(layers.number)
                stats = self._sums.stats(layers, layers.late_keys, None if earlier is None else earlier[0])
                self._project(layers, stats, self._sums.flags)

    def release(self) -> None:
        """Release the weights: the engine may move or free them now."""
        if self._local is not None:
            self._local.release(self._live)

    def _read_scalars(self, local: LocalSlices, shards: Sequence[BoundShard]) -> None:
        self.plan.frozen = {
            p.layer for s in shards if not s.requires_grad and s.grad is None for p in s.slices
        }
        self._scalars = local.hyperparams.read(shards)
        self.moves = self._scalars.moves
        self._flags[_HAS_GRAD] = self._scalars.has_grad
        found_inf = getattr(self.optimizer, "found_inf", None)
        self._scaled = found_inf is not None
        if found_inf is not None:
            self._flags[_FOUND_INF] = found_inf.to(self.plan.device, non_blocking=True)
        if self._guard is not None:
            self._guard[HAS_STATE] = local.hyperparams.has_state(shards)
            if self._binding.unverified.foreign:
                unseen = self._binding.unverified.fresh - self._binding.unverified.stepped
                look_for_training_(self._guard, self.optimizer, shards, self.plan.column, unseen)

    def _gather_live(self, local: LocalSlices, shards: Sequence[BoundShard]) -> list[LocalSlice]:
        live = local.gather_live(shards, getattr(self.optimizer, "grad_scale", None))
        for fqn, why in local.lost.items():
            raise AnchorError(f"layer {fqn!r}: {why}")
        if self._guard is not None:
            for item in live:
                if item.piece.layer in self.guarded and item.layers.rule.spec.anchored:
                    self._watch(self._guard, item)
        return live

    @staticmethod
    def _watch(guard: Tensor, item: LocalSlice) -> None:
        """Add one slice to the guard's rows."""
        for row, value in zip(
            (DELTA, DOT), layer_sums((b for _, b in item.blocks(grads=True)), GUARD_STATISTICS), strict=True
        ):
            guard[row, item.column] += value.to(guard.device)
        guard[MOVED, item.column] += float(item.moved)

    def _options(self, layers: RuleLayers) -> Options:
        lr, weight_decay = self._scalars.lr, self._scalars.weight_decay
        return Options(lr=lr[layers.columns], weight_decay=weight_decay[layers.columns])

    def _no_stats(self, layers: RuleLayers) -> Stats:
        return Stats(before={}, row_lengths=layers.row_lengths)

    def _active(self, layers: RuleLayers, stats: Stats, flags: Tensor) -> Tensor:
        """Which of the rule's layers actually step: bool `[num_layers]`."""
        active = (flags[_HAS_GRAD] > 0) & (flags[_FOUND_INF] == 0) & (self._scalars.lr != 0)
        return active[layers.columns] & self._finite(stats, layers)

    @staticmethod
    def _finite(stats: Stats, layers: RuleLayers) -> Tensor:
        finite = torch.ones_like(layers.columns, dtype=torch.bool)
        for stat, value in [*stats.before.items(), *stats.after.items()]:
            total = stats.over_rows(value, "sum") if stat.per == "row" else value
            finite &= torch.isfinite(total)
        return finite

    def _project(self, layers: RuleLayers, stats: Stats, flags: Tensor) -> None:
        """Find s of one rule's layers, advance its state, and pull."""
        rule, spec, options = layers.rule, layers.rule.spec, self._options(layers)
        active, limit = self._active(layers, stats, flags), self._scalars.max_pull[layers.columns]
        edited = self._edited.get(layers.number)
        state = dict(layers.state) if edited is None else edited[1]
        s = torch.zeros_like(options.lr)
        if spec.granularity != "element":
            s = rule.pull(stats, state, options)
        by_row = spec.granularity == "row"
        may, most = (stats.to_rows(active), stats.to_rows(limit)) if by_row else (active, limit)
        s = torch.where(may & torch.isfinite(s), torch.minimum(s, most), 0.0)
        if self.base_decays and spec.when == "before" and not spec.decays:
            s = torch.where(self._decayed_by_base(layers), 0.0, s)
        layers.state = {name: torch.where(active, state[name], old) for name, old in layers.state.items()}
        if spec.granularity == "layer" and not spec.shard_state:
            for batch in self._batches:
                if batch.layers is layers:
                    batch.pull_(s)
        else:
            pull = SlicePull(stats, s, options, active, limit)
            for item in self._live:
                if item.layers is layers:
                    pull(item)
        per_layer = stats.over_rows(s, "max").clamp(min=0.0) if by_row else s
        if spec.granularity == "element" or spec.edits_grad:
            per_layer = torch.full_like(s, torch.nan)  # the pull is not one number per layer
        self.plan.reports[layers.number] = {"s": per_layer, **self._report(layers, stats, per_layer, flags)}

    def _decayed_by_base(self, layers: RuleLayers) -> Tensor:
        groups = {piece.layer: id(shard.param_group) for shard in self.shards for piece in shard.slices}
        decayed = [groups[fqn] in self.base_decays for fqn in layers.fqns]
        return torch.tensor(decayed, device=self.plan.device)

    def _decay(self, layers: RuleLayers) -> None:
        """Apply AdamW's decay to layers that take their strength from their param group."""
        s = self._options(layers).lr * self._options(layers).weight_decay
        active = self._active(layers, self._no_stats(layers), self._flags)
        from_group = [self._binding.options[fqn].weight_decay is None for fqn in layers.fqns]
        s = torch.where(active & torch.tensor(from_group, device=s.device) & torch.isfinite(s), s, 0.0)
        if self.base_decays:
            s = torch.where(self._decayed_by_base(layers), 0.0, s)
        for item in self._live:
            if item.layers is layers:
                pull_(item.tensors.flat_weight(), None, s[item.index])
                item.write_back()

    def _report(self, layers: RuleLayers, stats: Stats, s: Tensor, flags: Tensor) -> dict[str, Tensor]:
        stepped = (flags[_HAS_GRAD] > 0)[layers.columns]
        report = {"nonfinite": stepped & ~self._finite(stats, layers), **layers.rule.telemetry(stats, s)}
        if DELTA_SQ in stats.after and layers.rule.spec.granularity == "layer":
            now = stats.after[DELTA_SQ].sqrt() * (1 - s).abs()
            report["deviation"] = torch.where(stepped, now, torch.nan)
        return report
