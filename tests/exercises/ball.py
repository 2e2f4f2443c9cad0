"""A rule of one's own, in one file: every layer stays within a ball around its anchor."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sharded_spd.rules import Options, Rule, RuleSpec, Stats, register
from sharded_spd.rules.statistics import DELTA_SQ


@register
@dataclass(frozen=True, slots=True)
class Ball(Rule):
    """w <- w0 + min(1, radius / |w~ - w0|) (w~ - w0)."""

    radius: float = 0.1
    name: ClassVar[str] = "ball"
    spec: ClassVar[RuleSpec] = RuleSpec(after=(DELTA_SQ,))

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """1 - radius / |w~ - w0| outside of the ball, 0 inside."""
        norm = stats.after[DELTA_SQ].sqrt()
        return torch.where(norm > self.radius, 1 - self.radius / norm, 0.0)
