"""Selective Projection Decay (Tian, Huang, Kira, NeurIPS 2024, arXiv 2411.01713)."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sharded_spd.rules.base import Options, Rule, RuleSpec, Stats
from sharded_spd.rules.statistics import DELTA_SQ, GRAD_DOT_DELTA


@dataclass(frozen=True, slots=True)
class SPD(Rule):
    """Pull a layer back only where its gradient contradicts its deviation.

    With d = w - w0, c = -<g, d> (Alg. 1 of the paper, memoryless as in its released code),
    r = clamp((|w~ - w0| - |d|) / |w~ - w0|, 0, 1):  s = lambda * r where c < 0, else 0.
    """

    name: ClassVar[str] = "spd"
    spec: ClassVar[RuleSpec] = RuleSpec(before=(GRAD_DOT_DELTA, DELTA_SQ), after=(DELTA_SQ,))

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """S `[num_layers]`; see the class."""
        inconsistent = stats.before[GRAD_DOT_DELTA] > 0
        return torch.where(inconsistent, options.weight_decay * self._ratio(stats), 0.0)

    def telemetry(self, stats: Stats, s: Tensor) -> Mapping[str, Tensor]:
        """Condition c and ratio r."""
        return {"c": -stats.before[GRAD_DOT_DELTA], "r": self._ratio(stats)}

    @staticmethod
    def _ratio(stats: Stats) -> Tensor:
        n0, n1 = stats.before[DELTA_SQ].sqrt(), stats.after[DELTA_SQ].sqrt()
        gain = stats.after[DELTA_SQ] - stats.before[DELTA_SQ]
        denominator = n1 * (n1 + n0)
        ratio = gain / torch.where(n1 > 0, denominator, 1.0)
        return torch.where(n1 > 0, ratio, 0.0).clamp(0.0, 1.0)
