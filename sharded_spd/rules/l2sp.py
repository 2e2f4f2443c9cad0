"""L2-SP, decoupled: a constant pull toward the anchor."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sharded_spd.rules.base import Options, Rule, RuleSpec, Stats


@dataclass(frozen=True, slots=True)
class L2SP(Rule):
    """w <- w~ - lr * lambda * (w~ - w0): L2-SP (Li et al., ICML 2018), decoupled as AdamW's decay is."""

    name: ClassVar[str] = "l2sp"
    spec: ClassVar[RuleSpec] = RuleSpec()

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """S = lr * lambda, `[num_layers]`."""
        return options.lr * options.weight_decay
