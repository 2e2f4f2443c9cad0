"""Which of a method's candidates to take, by the validation set."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tuned:
    """How scores are compared: the direction, and how far from the best is as good.

    `slack`: a share of the best; None: one standard error of a share in percent over `examples`.
    """

    higher_is_better: bool
    examples: int
    slack: float | None


def as_good(found: Mapping[int, Sequence[float]], kind: Tuned) -> set[int]:
    """The candidates that the validation set cannot tell from the best one."""
    sign = 1 if kind.higher_is_better else -1
    means = {c: statistics.fmean(scores) for c, scores in found.items()}
    best = max(means.values(), key=lambda mean: sign * mean if math.isfinite(mean) else -math.inf)
    if kind.slack is not None:
        slack = kind.slack * abs(best)
    else:
        share = min(1.0, best / 100)
        slack = 100 * math.sqrt(share * (1 - share) / kind.examples)
    return {c for c, mean in means.items() if sign * (mean - best) >= -slack - 1e-9}


def choose(found: Mapping[int, Sequence[float]], kind: Tuned) -> int:
    """The last of them: they go from weak to strong, and the strongest stays closest to the start."""
    return max(as_good(found, kind))
