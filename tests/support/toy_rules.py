"""Two rules that use all of the seam, and the same written plainly for whole tensors."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sharded_spd.rules import Options, Rule, RuleSpec, Stats
from sharded_spd.rules.base import RowValues
from sharded_spd.rules.statistics import DELTA_SQ, GRAD_DOT_DELTA, ROW_L1, Block, Statistic
from tests.reference.oracle import LayerStats, Oracle

GRAD_DOT_PREVIOUS = Statistic("grad_dot_previous", lambda b: b.grad * b.state["previous"], per="row")


@dataclass(frozen=True, slots=True)
class RowBall(Rule):
    """Scales each row of w~ - w0 into an L1 ball whose radius, one per layer, follows the data.

    The radius begins at lambda times the longest row; it shrinks where the gradient goes along the rows'
    scaled previous deviations, and grows elsewhere.
    """

    name: ClassVar[str] = "row_ball"
    spec: ClassVar[RuleSpec] = RuleSpec(
        before=(GRAD_DOT_PREVIOUS,),
        after=(ROW_L1,),
        granularity="row",
        layer_state=("radius",),
        shard_state=("previous",),
    )

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """1 - radius / |row| for the rows outside the ball."""
        rows = stats.after[ROW_L1]
        along = stats.over_rows(stats.before[GRAD_DOT_PREVIOUS], "sum")
        longest = stats.over_rows(rows, "max")
        radius = state["radius"]
        moved = torch.where(along > 0, 0.8 * radius, 1.25 * radius)
        state["radius"] = torch.where(radius == 0, options.weight_decay * longest, moved)
        radius = stats.to_rows(state["radius"])
        return torch.where(rows > radius, 1 - radius / torch.where(rows > 0, rows, 1.0), 0.0)

    def next_shard_state(self, block: Block, stats: Stats, rows: RowValues) -> Mapping[str, Tensor]:
        """The rows' deviation over their L1 norms."""
        return {"previous": block.delta / (rows(stats.after[ROW_L1]) + 1e-3)}


@dataclass
class RowBallOracle(Oracle):
    """`RowBall` around Adam on whole tensors, row by row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.radius: dict[str, float] = {}
        self.previous: dict[str, Tensor] = {}

    def step(self, grads: Mapping[str, Tensor]) -> dict[str, LayerStats]:
        """`s` of the statistics is the strongest pull of a row."""
        result = {}
        for name, given in grads.items():
            grad, anchor = given.double(), self.anchors[name]
            tentative = self._adam(name, grad)
            delta = _rows(tentative - anchor)
            norms = delta.abs().sum(1)
            along = float((_rows(grad) * self.previous.get(name, torch.zeros_like(delta))).sum())
            old, strength = self.radius.get(name, 0.0), self.of(name).weight_decay
            grown = old * (0.8 if along > 0 else 1.25)
            self.radius[name] = strength * float(norms.max()) if old == 0 else grown
            self.previous[name] = delta / (norms + 1e-3)[:, None]
            shares = [min(1.0, self.radius[name] / n) if n > 0 else 1.0 for n in norms.tolist()]
            scale = torch.tensor(shares, dtype=torch.float64)[:, None]
            self.weights[name] = anchor + (delta * scale).view(anchor.shape)
            result[name] = LayerStats(0.0, 0.0, 0.0, 0.0, 1 - min(shares))
        return result


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], -1) if tensor.ndim > 1 else tensor.reshape(1, -1)


@dataclass(frozen=True, slots=True)
class TurnBack(Rule):
    """Takes from the gradient a growing share of its component that leads away from the anchor."""

    name: ClassVar[str] = "turn_back"
    spec: ClassVar[RuleSpec] = RuleSpec(
        before=(GRAD_DOT_DELTA, DELTA_SQ), edits_grad=True, layer_state=("share",)
    )

    def plan_edit(
        self, stats: Stats, state: MutableMapping[str, Tensor], options: Options
    ) -> Mapping[str, Tensor]:
        """How much of d to take from g: share * <g, d> / |d|^2 where <g, d> < 0."""
        state["share"] = (state["share"] + 0.15).clamp(max=1.0)
        dot, square = stats.before[GRAD_DOT_DELTA], stats.before[DELTA_SQ]
        away = (dot < 0) & (square > 0)
        return {"amount": torch.where(away, state["share"] * dot / torch.where(away, square, 1.0), 0.0)}

    def edit_grad(self, block: Block, plan: Mapping[str, Tensor]) -> Tensor:
        """g - amount * d."""
        return block.grad - plan["amount"] * block.delta

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """Nothing: the gradient is all that is changed."""
        return torch.zeros_like(options.lr)


@dataclass
class TurnBackOracle(Oracle):
    """`TurnBack` before Adam on whole tensors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.share: dict[str, float] = {}

    def step(self, grads: Mapping[str, Tensor]) -> dict[str, LayerStats]:
        """`s` of the statistics is the share that was taken."""
        result = {}
        for name, given in grads.items():
            grad = given.double()
            d = self.weights[name] - self.anchors[name]
            dot, square = float((grad * d).sum()), float((d * d).sum())
            self.share[name] = min(1.0, self.share.get(name, 0.0) + 0.15)
            away = dot < 0 and square > 0
            if away:
                grad = grad - self.share[name] * dot / square * d
            self.weights[name] = self._adam(name, grad)
            result[name] = LayerStats(-dot, square**0.5, 0.0, 0.0, self.share[name] if away else 0.0)
        return result
