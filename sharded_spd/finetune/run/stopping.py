"""When a training has not become better for long enough."""

from __future__ import annotations

from collections.abc import Sequence

from sharded_spd.config.loading import choice
from sharded_spd.finetune.config import StoppingConfig
from sharded_spd.finetune.metrics import Metric, UserMetric
from sharded_spd.finetune.report.records import ID, Evaluation

VALIDATION = "validation"
"""The name of the validation set among the metrics."""


def stops_early(
    config: StoppingConfig | None, history: Sequence[Evaluation], metrics: Sequence[Metric | UserMetric]
) -> bool:
    """Whether the last `patience` evaluations after the zero-shot one brought nothing better.

    Raises:
        ConfigError: the metric or the set to look at is not one of the job's.
    """
    if config is None:
        return False
    named = {metric.name: metric for metric in metrics}
    wanted = config.metric or metrics[0].name
    if wanted not in named:
        raise choice("train.early_stopping.metric", wanted, list(named))
    sets = history[-1].metrics
    where = config.set or (VALIDATION if VALIDATION in sets else ID)
    if where not in sets:
        raise choice("train.early_stopping.set", where, list(sets))
    sign = 1 if named[wanted].higher_is_better else -1
    values = [sign * found.metrics[where][wanted] for found in history if found.step > 0]
    best, since = float("-inf"), 0
    for value in values:
        better = value > best + config.min_delta or best == float("-inf")
        best, since = (value, 0) if better else (best, since + 1)
    return since >= config.patience
