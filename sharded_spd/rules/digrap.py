"""DiGraP (arXiv 2502.15895, ICLR 2025): removes from the gradient what leads away from the anchor."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sharded_spd.rules import hyper
from sharded_spd.rules.base import Options, RowValues, Rule, RuleSpec, Stats
from sharded_spd.rules.check import check_range
from sharded_spd.rules.statistics import DELTA_SQ, GRAD_DOT_DELTA, GRAD_DOT_PREVIOUS, GRAD_SQ, Block


@dataclass(frozen=True, slots=True)
class DiGraP(Rule):
    """Where <g, d> < 0, d = w - w0: g <- g - omega * p before the base step, p = (<g, d> / |d|^2) d.

    omega in [0, 1], one per layer, is 0 in the first step and then moved by Adam (lr `mu`) along the
    hyper-gradient. An interpretation, where the paper leaves it open: the hyper-gradient is the cosine
    <g, p'> / (|g| |p'|) of the raw gradient and the last step's p', 0 where p' was not there to be taken
    (<g', d'> >= 0: omega had no effect); mu is that of FTP. In `AdamSPD`, `weight_decay` is AdamW's decay.

    Args:
        mu: learning rate of omega.
    """

    mu: float = 1e-2
    name: ClassVar[str] = "digrap"
    spec: ClassVar[RuleSpec] = RuleSpec(
        before=(GRAD_DOT_DELTA, DELTA_SQ, GRAD_DOT_PREVIOUS, GRAD_SQ),
        edits_grad=True,
        keeps_w=True,
        decays=True,
        layer_state=("omega", "away", "norm", *hyper.STATE),
        shard_state=("previous",),
    )

    def __post_init__(self) -> None:
        """Raises ConfigError for a `mu` out of range."""
        check_range(self.name, "mu", self.mu, least=0.0)

    def plan_edit(
        self, stats: Stats, state: MutableMapping[str, Tensor], options: Options
    ) -> Mapping[str, Tensor]:
        """How much of d to take from g: omega * <g, d> / |d|^2 where <g, d> < 0, else 0."""
        dot, square = stats.before[GRAD_DOT_DELTA], stats.before[DELTA_SQ]
        # p' is a negative multiple of d', so the cosine with it is minus the cosine with d'.
        length = stats.before[GRAD_SQ].sqrt() * state["norm"]
        along = -state["away"] * stats.before[GRAD_DOT_PREVIOUS]
        h = torch.where(length > 0, along / torch.where(length > 0, length, 1.0), 0.0)
        state["omega"] = (state["omega"] + hyper.adam_step(state, h, lr=self.mu)).clamp(0.0, 1.0)
        away = (dot < 0) & (square > 0)
        state["away"], state["norm"] = away.double(), square.sqrt()
        return {"amount": torch.where(away, state["omega"] * dot / torch.where(away, square, 1.0), 0.0)}

    def edit_grad(self, block: Block, plan: Mapping[str, Tensor]) -> Tensor:
        """g - omega * p."""
        return block.grad - plan["amount"] * block.delta

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """No pull: only the gradient changes."""
        return torch.zeros_like(options.lr)

    def next_shard_state(self, block: Block, stats: Stats, rows: RowValues) -> Mapping[str, Tensor]:
        """D of this step."""
        return {"previous": block.kept_delta}
