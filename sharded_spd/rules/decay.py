"""Rules that ignore the anchor: decoupled weight decay, and nothing at all."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sharded_spd.rules.base import Options, Rule, RuleSpec, Stats


@dataclass(frozen=True, slots=True)
class Decay(Rule):
    """w <- w - lr * lambda * w before the base step: AdamW's decay (Loshchilov and Hutter, 2019)."""

    name: ClassVar[str] = "decay"
    spec: ClassVar[RuleSpec] = RuleSpec(when="before", anchored=False)

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """S = lr * lambda, `[num_layers]`."""
        return options.lr * options.weight_decay


@dataclass(frozen=True, slots=True)
class NoRule(Rule):
    """The base optimizer alone."""

    name: ClassVar[str] = "none"
    spec: ClassVar[RuleSpec] = RuleSpec(anchored=False, pulls=False)

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """S = 0, `[num_layers]`."""
        return torch.zeros_like(options.lr)
