"""Choosing a strength from validation scores alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal


def choose_strength(
    scores: Mapping[float, Sequence[float]],
    *,
    examples: int,
    rule: Literal["one-standard-error", "best"],
    higher_is_better: bool = True,
) -> float:
    """The strength to use, from each candidate's validation scores (one per seed), in percent.

    "best": the highest mean, the larger strength where two are equal. "one-standard-error": the largest
    strength whose mean is within one standard error of the highest: of those that the validation set cannot
    tell apart, the one that stays closest to the pre-trained weights. The standard error is that of a share
    `p` of the `examples` of the validation set, sqrt(p (1 - p) / examples).
    """
    sign = 1 if higher_is_better else -1
    means = {strength: sign * statistics.fmean(values) for strength, values in scores.items()}
    best = max(means.values())
    slack = 1e-9
    if rule == "one-standard-error":
        share = min(1.0, best / 100)
        slack += 100 * math.sqrt(share * (1 - share) / examples)
    return max(strength for strength, mean in means.items() if mean >= best - slack)
