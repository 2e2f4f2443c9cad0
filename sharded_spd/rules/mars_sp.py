"""MARS-SP: a fixed ball around every row of the anchor (Gouk, Hospedales, Pontil, ICLR 2021)."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sharded_spd.rules.base import Options, Rule, RuleSpec, Stats
from sharded_spd.rules.check import check_range
from sharded_spd.rules.statistics import ROW_L1


@dataclass(frozen=True, slots=True)
class MARSSP(Rule):
    """Scale each row of w~ - w0 into an L1 ball: w <- w0 + min(1, radius / |row|_1) * (w~ - w0).

    A row is one index of dim 0; a 1-D layer is one row. In `AdamSPD`, `weight_decay` is AdamW's decay.

    Args:
        radius: of the ball, gamma in the paper.
    """

    radius: float
    name: ClassVar[str] = "mars_sp"
    spec: ClassVar[RuleSpec] = RuleSpec(after=(ROW_L1,), granularity="row", decays=True)

    def __post_init__(self) -> None:
        """Raises ConfigError for a radius that is not positive."""
        check_range(self.name, "radius", self.radius, least=0.0, above=True)

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """S = 1 - min(1, radius / |row|_1), `[num_rows]`."""
        return 1 - self.radius / stats.after[ROW_L1].clamp(min=self.radius)
