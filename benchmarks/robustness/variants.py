"""Rules that were tried and are not in the package: what the seam makes cheap, for `search.py`.

d = w - w0 before the step, u = w~ - w, d~ = w~ - w0; "drag" pulls by a share of the step's own length:
s = lambda |u| / |d~|, a constant force toward the anchor, whatever lr and the distance are.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sharded_spd.rules import MAPS, SPD, Options, Rule, RuleSpec, Stats, register
from sharded_spd.rules.statistics import DELTA_SQ, GRAD_DOT_DELTA, GRAD_SQ, Block, Statistic

UPDATE_SQ = Statistic("update_sq", lambda b: b.update * b.update)
UPDATE_DOT_DELTA = Statistic("update_dot_delta", lambda b: b.update * b.kept_delta)
ROW_UPDATE_SQ = Statistic("row_update_sq", lambda b: b.update * b.update, per="row")
ROW_DELTA_SQ = Statistic("row_delta_sq", lambda b: b.delta * b.delta, per="row")
ROW_GRAD_DOT_DELTA = Statistic("row_grad_dot_delta", lambda b: b.grad * b.delta, per="row")


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / torch.where(below > 0, below, 1.0), 0.0)


def _growth(before: Tensor, after: Tensor) -> Tensor:
    return _ratio(after.sqrt() - before.sqrt(), after.sqrt()).clamp(0.0, 1.0)


@register
@dataclass(frozen=True, slots=True)
class SPDRows(Rule):
    """SPD row by row: s = lambda * r of a row where its <g, d> > 0."""

    name: ClassVar[str] = "spd-rows"
    spec: ClassVar[RuleSpec] = RuleSpec(
        before=(ROW_GRAD_DOT_DELTA, ROW_DELTA_SQ), after=(ROW_DELTA_SQ,), granularity="row"
    )

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """S `[num_rows]`."""
        r = _growth(stats.before[ROW_DELTA_SQ], stats.after[ROW_DELTA_SQ])
        return torch.where(stats.before[ROW_GRAD_DOT_DELTA] > 0, stats.to_rows(options.weight_decay) * r, 0.0)


@register
@dataclass(frozen=True, slots=True)
class SPDElements(Rule):
    """SPD element by element, the update in the gradient's place: s = lambda * r where u takes it away."""

    name: ClassVar[str] = "spd-elements"
    spec: ClassVar[RuleSpec] = RuleSpec(granularity="element", keeps_w=True)

    def pull_elements(self, block: Block, lr: Tensor, weight_decay: Tensor) -> Tensor:
        """S = lambda (|d~| - |d|) / |d~|, the first step apart."""
        before, after = block.kept_delta.abs(), block.delta.abs()
        r = _ratio(after - before, after).clamp(0.0, 1.0)
        return torch.where(before > 0, weight_decay * r, 0.0)


@register
@dataclass(frozen=True, slots=True)
class SPDUpdate(Rule):
    """L2-SP of the layers that the step moves toward the anchor anyway: s = lr * lambda where <u, d> <= 0."""

    name: ClassVar[str] = "update-gate"
    spec: ClassVar[RuleSpec] = RuleSpec(after=(UPDATE_DOT_DELTA,), keeps_w=True)

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """S `[num_layers]`."""
        return torch.where(stats.after[UPDATE_DOT_DELTA] <= 0, options.lr * options.weight_decay, 0.0)


@register
@dataclass(frozen=True, slots=True)
class SPDGrowth(SPD):
    """SPD without its condition: s = lambda * r in every step but the first."""

    name: ClassVar[str] = "growth"

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """S `[num_layers]`."""
        return torch.where(stats.before[DELTA_SQ] > 0, options.weight_decay * self._ratio(stats), 0.0)


@register
@dataclass(frozen=True, slots=True)
class GateL2(Rule):
    """L2-SP where SPD would pull: s = lr * lambda where <g, d> > 0."""

    name: ClassVar[str] = "gated-l2"
    spec: ClassVar[RuleSpec] = RuleSpec(before=(GRAD_DOT_DELTA,))

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """S `[num_layers]`."""
        return torch.where(stats.before[GRAD_DOT_DELTA] > 0, options.lr * options.weight_decay, 0.0)


@register
@dataclass(frozen=True, slots=True)
class Drag(Rule):
    """s = lambda |u| / |d~| of the layer."""

    name: ClassVar[str] = "drag"
    spec: ClassVar[RuleSpec] = RuleSpec(after=(UPDATE_SQ, DELTA_SQ), keeps_w=True)

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """S `[num_layers]`."""
        return options.weight_decay * _ratio(stats.after[UPDATE_SQ].sqrt(), stats.after[DELTA_SQ].sqrt())


@register
@dataclass(frozen=True, slots=True)
class DragGated(Rule):
    """Drag where SPD would pull, <g, d> > 0."""

    name: ClassVar[str] = "drag-gated"
    spec: ClassVar[RuleSpec] = RuleSpec(before=(GRAD_DOT_DELTA,), after=(UPDATE_SQ, DELTA_SQ), keeps_w=True)

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """S `[num_layers]`."""
        s = options.weight_decay * _ratio(stats.after[UPDATE_SQ].sqrt(), stats.after[DELTA_SQ].sqrt())
        return torch.where(stats.before[GRAD_DOT_DELTA] > 0, s, 0.0)


@register
@dataclass(frozen=True, slots=True)
class DragRows(Rule):
    """s = lambda |u| / |d~| of the row."""

    name: ClassVar[str] = "drag-rows"
    spec: ClassVar[RuleSpec] = RuleSpec(after=(ROW_UPDATE_SQ, ROW_DELTA_SQ), granularity="row", keeps_w=True)

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """S `[num_rows]`."""
        share = _ratio(stats.after[ROW_UPDATE_SQ].sqrt(), stats.after[ROW_DELTA_SQ].sqrt())
        return stats.to_rows(options.weight_decay) * share


@register
@dataclass(frozen=True, slots=True)
class DragElements(Rule):
    """A soft threshold in every step: |d~| falls by lambda |u|, to 0 at most."""

    name: ClassVar[str] = "drag-elements"
    spec: ClassVar[RuleSpec] = RuleSpec(granularity="element", keeps_w=True)

    def pull_elements(self, block: Block, lr: Tensor, weight_decay: Tensor) -> Tensor:
        """S = lambda |u| / |d~|."""
        return weight_decay * _ratio(block.update.abs(), block.delta.abs())


@register
@dataclass(frozen=True, slots=True)
class DragDepth(MAPS):
    """Drag whose lambda falls with depth, as that of MAPS."""

    name: ClassVar[str] = "drag-depth"
    spec: ClassVar[RuleSpec] = RuleSpec(after=(UPDATE_SQ, DELTA_SQ), keeps_w=True, layer_state=("share",))

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """S `[num_layers]`."""
        own = replace(options, weight_decay=options.weight_decay * state["share"])
        return Drag.pull(self, stats, state, own)  # type: ignore[arg-type]

    def telemetry(self, stats: Stats, s: Tensor) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}


@register
@dataclass(frozen=True, slots=True)
class L2Depth(MAPS):
    """L2-SP whose lambda falls with depth, as that of MAPS."""

    name: ClassVar[str] = "l2-depth"
    spec: ClassVar[RuleSpec] = RuleSpec(layer_state=("share",))

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """S `[num_layers]`."""
        return options.lr * options.weight_decay * state["share"]

    def telemetry(self, stats: Stats, s: Tensor) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}


@register
@dataclass(frozen=True, slots=True)
class Unsure(Rule):
    """L2-SP of the elements that Adam is unsure of: s = lr * lambda * max(0, 1 - |u| / lr)."""

    name: ClassVar[str] = "unsure"
    spec: ClassVar[RuleSpec] = RuleSpec(granularity="element", keeps_w=True)

    def pull_elements(self, block: Block, lr: Tensor, weight_decay: Tensor) -> Tensor:
        """S of each element."""
        return lr * weight_decay * (1 - block.update.abs() / lr).clamp(min=0.0)


@register
@dataclass(frozen=True, slots=True)
class UnsureSquared(Rule):
    """As `unsure`, squared: s = lr * lambda * max(0, 1 - |u| / lr)^2."""

    name: ClassVar[str] = "unsure-squared"
    spec: ClassVar[RuleSpec] = RuleSpec(granularity="element", keeps_w=True)

    def pull_elements(self, block: Block, lr: Tensor, weight_decay: Tensor) -> Tensor:
        """S of each element."""
        return lr * weight_decay * (1 - block.update.abs() / lr).clamp(min=0.0).square()


@register
@dataclass(frozen=True, slots=True)
class SPDRunning(SPD):
    """SPD whose condition is a running mean: m <- 0.9 m + 0.1 <g, d> / (|g| |d|), pulled where m > 0."""

    name: ClassVar[str] = "spd-running"
    spec: ClassVar[RuleSpec] = RuleSpec(
        before=(GRAD_DOT_DELTA, DELTA_SQ, GRAD_SQ), after=(DELTA_SQ,), layer_state=("mean",)
    )

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """S `[num_layers]`."""
        length = (stats.before[DELTA_SQ] * stats.before[GRAD_SQ]).sqrt()
        state["mean"] = 0.9 * state["mean"] + 0.1 * _ratio(stats.before[GRAD_DOT_DELTA], length)
        return torch.where(state["mean"] > 0, options.weight_decay * self._ratio(stats), 0.0)


@register
@dataclass(frozen=True, slots=True)
class SPDCosine(SPD):
    """SPD with a condition of degrees: s = lambda * r * max(0, cos(g, d))."""

    name: ClassVar[str] = "spd-cosine"
    spec: ClassVar[RuleSpec] = RuleSpec(before=(GRAD_DOT_DELTA, DELTA_SQ, GRAD_SQ), after=(DELTA_SQ,))

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """S `[num_layers]`."""
        length = (stats.before[DELTA_SQ] * stats.before[GRAD_SQ]).sqrt()
        cosine = _ratio(stats.before[GRAD_DOT_DELTA], length).clamp(min=0.0)
        return options.weight_decay * cosine * self._ratio(stats)


@register
@dataclass(frozen=True, slots=True)
class DragCosine(Rule):
    """Drag with a condition of degrees: s = lambda * max(0, cos(g, d)) |u| / |d~|."""

    name: ClassVar[str] = "drag-cosine"
    spec: ClassVar[RuleSpec] = RuleSpec(
        before=(GRAD_DOT_DELTA, DELTA_SQ, GRAD_SQ), after=(UPDATE_SQ, DELTA_SQ), keeps_w=True
    )

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """S `[num_layers]`."""
        length = (stats.before[DELTA_SQ] * stats.before[GRAD_SQ]).sqrt()
        cosine = _ratio(stats.before[GRAD_DOT_DELTA], length).clamp(min=0.0)
        share = _ratio(stats.after[UPDATE_SQ].sqrt(), stats.after[DELTA_SQ].sqrt())
        return options.weight_decay * cosine * share
