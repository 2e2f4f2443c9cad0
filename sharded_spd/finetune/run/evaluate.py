"""Metrics of a model over whole sets, shared out among the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sharded_spd.finetune.data.examples import ExampleSet
from sharded_spd.finetune.engines.base import Engine
from sharded_spd.finetune.metrics import IGNORED, Accuracy, Metric, Outcome, UserMetric
from sharded_spd.finetune.tasks.registry import Task
from sharded_spd.finetune.world import World

Found = dict[str, dict[str, float]]
"""Metrics by name, by the name of their set."""


def evaluate(
    engine: Engine,
    task: Task,
    sets: Mapping[str, ExampleSet],
    *,
    metrics: Sequence[Metric | UserMetric],
    batch_size: int,
) -> Found:
    """Each metric of each set, the same on every rank. Collective.

    Every rank runs the same number of batches, since a sharded model's forward is a collective: where its
    share is shorter it repeats its last example, which does not count.
    """
    was_training = engine.model.training
    engine.model.eval()
    with torch.no_grad():
        found = {
            name: _score(engine, task, data, metrics=metrics, batch_size=batch_size)
            for name, data in sets.items()
        }
    engine.after_evaluation()
    engine.model.train(was_training)
    return found


def retained(engine: Engine, task: Task, sets: Mapping[str, ExampleSet]) -> dict[str, float]:
    """The accuracy at each retained task, of which an example is a whole pool, in percent. Collective."""
    if not sets:
        return {}
    found = evaluate(engine, task, sets, metrics=[Accuracy()], batch_size=1)
    return {name: values[Accuracy.name] for name, values in found.items()}


def _score(
    engine: Engine,
    task: Task,
    data: ExampleSet,
    *,
    metrics: Sequence[Metric | UserMetric],
    batch_size: int,
) -> dict[str, float]:
    world, count = engine.world, len(data)
    share = -(-count // world.size)
    mine = torch.arange(world.rank * share, (world.rank + 1) * share)
    summed: dict[str, torch.Tensor] = {}
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    users = [metric for metric in metrics if isinstance(metric, UserMetric)]
    for indices in mine.split(batch_size):
        batch = take(data, indices.clamp(max=count - 1), world)
        with engine.autocast():
            outcome = task.outcome(engine.model, batch)
        counts = (indices < count).to(outcome.logits.device)
        for metric in metrics:
            if not isinstance(metric, UserMetric):
                own = (metric.sums(outcome) * counts.unsqueeze(-1)).sum(0)
                summed[metric.name] = summed[metric.name] + own if metric.name in summed else own
        if users:
            kept.append(_for_users(outcome, counts))
    found = {
        m.name: m.value(world.sum_(summed[m.name]).cpu()) for m in metrics if not isinstance(m, UserMetric)
    }
    if users:
        predictions, labels = _everywhere(kept, world)
        for metric in users:
            found[metric.name] = world.agree(lambda m=metric: m.score(predictions, labels))  # type: ignore[misc]
    return {metric.name: found[metric.name] for metric in metrics}


def take(data: ExampleSet, indices: torch.Tensor, world: World) -> Mapping[str, torch.Tensor]:
    """A batch; where reading it can fail, all ranks fail together. Collective for a lazy set."""
    if not data.lazy:
        return data.take(indices)
    return world.agree(lambda: data.take(indices))


def _for_users(outcome: Outcome, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    predictions = outcome.predicted if outcome.by_token else outcome.logits.float()
    return predictions[counts].cpu(), outcome.labels[counts].cpu()


def _everywhere(
    kept: Sequence[tuple[torch.Tensor, torch.Tensor]], world: World
) -> tuple[torch.Tensor, torch.Tensor]:
    """The predictions and labels of the whole set in its order, on every rank. Collective."""
    parts = [pair for pairs in world.gather(list(kept)) for pair in pairs if len(pair[1])]
    width = max(labels.shape[-1] for _, labels in parts) if parts[0][1].ndim == 2 else None

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        if width is None:
            return tensor
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]), value=IGNORED)

    return torch.cat([padded(p) for p, _ in parts]), torch.cat([padded(y) for _, y in parts])
