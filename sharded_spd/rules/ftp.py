"""Fast Trainable Projection (Tian et al., NeurIPS 2023, arXiv 2310.19182)."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sharded_spd.rules import hyper
from sharded_spd.rules.base import LayerInfo, Options, RowValues, Rule, RuleSpec, Stats
from sharded_spd.rules.check import check_range
from sharded_spd.rules.statistics import GRAD_DOT_PREVIOUS, ROW_L1, Block

_TINY = 1e-8
"""The first radius, its lower limit, and what is added to a row's norm."""


@dataclass(frozen=True, slots=True)
class FTP(Rule):
    """Scale each row of w~ - w0 into an L1 ball, whose radius, one per layer, is learned from the gradients.

    With n = |row of w~ - w0|_1 + 1e-8: w <- w0 + min(1, radius / n) * (w~ - w0). The radius is 1e-8 in the
    first step; then Adam (lr `mu`) moves it along h = sum over rows of <g, c'> / n', c' and n' being w~ - w0
    and n of the step before, and it is kept within [1e-8, max n]. A 1-D layer is one row. In `AdamSPD`,
    `weight_decay` is AdamW's decay, as in the published optimizer: the method has no strength of its own.

    Args:
        k: multiplies h where it would shrink the radius (h > 0); 0 never shrinks it, 1 is the plain method.
        mu: learning rate of the radius.
    """

    k: float = 1.0
    mu: float = 1e-2
    name: ClassVar[str] = "ftp"
    spec: ClassVar[RuleSpec] = RuleSpec(
        before=(GRAD_DOT_PREVIOUS,),
        after=(ROW_L1,),
        granularity="row",
        decays=True,
        layer_state=("radius", *hyper.STATE),
        shard_state=("previous",),
    )

    def __post_init__(self) -> None:
        """Raises ConfigError for a `k` or `mu` out of range."""
        check_range(self.name, "k", self.k, least=0.0)
        check_range(self.name, "mu", self.mu, least=0.0)

    def prepare(self, layers: Sequence[LayerInfo]) -> Mapping[str, Tensor]:
        """The radius is 1e-8, all else 0; `[num_layers]` each."""
        zero = torch.zeros(len(layers), dtype=torch.float64)
        return {**dict.fromkeys(hyper.STATE, zero), "radius": torch.full_like(zero, _TINY)}

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """S = 1 - min(1, radius / n), `[num_rows]`."""
        n = stats.after[ROW_L1] + _TINY
        h = stats.before[GRAD_DOT_PREVIOUS]  # 0 in the first step: there is no previous deviation
        h = torch.where(h > 0, self.k * h, h)
        radius = state["radius"] + hyper.adam_step(state, h, lr=self.mu)
        state["radius"] = torch.minimum(radius, stats.over_rows(n, "max")).clamp(min=_TINY)
        return (1 - stats.to_rows(state["radius"]) / n).clamp(min=0.0)

    def next_shard_state(self, block: Block, stats: Stats, rows: RowValues) -> Mapping[str, Tensor]:
        """(w~ - w0) / n: all that the next hyper-gradient needs of this step, in one tensor."""
        return {"previous": block.delta / rows(stats.after[ROW_L1] + _TINY)}
