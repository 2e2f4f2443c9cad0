"""Cautious weight decay (ICLR 2026), toward the anchor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sharded_spd.rules.base import Rule, RuleSpec
from sharded_spd.rules.statistics import Block


@dataclass(frozen=True, slots=True)
class CWD(Rule):
    """Decay only the elements that the step moves toward the anchor as well.

    With d = w - w0 before the step and u the base's direction, w~ = w - lr * u:
    w <- w~ - lr * lambda * 1[u * d >= 0] * d. The paper decays toward zero: `anchor="zero"` gives that.
    """

    name: ClassVar[str] = "cwd"
    spec: ClassVar[RuleSpec] = RuleSpec(granularity="element", keeps_w=True, pulls_kept=True)

    def pull_elements(self, block: Block, lr: Tensor, weight_decay: Tensor) -> Tensor:
        """S = lr * lambda where u * d >= 0, that is (w~ - w) * d <= 0."""
        return torch.where(block.update * block.kept_delta <= 0, lr * weight_decay, 0.0)
