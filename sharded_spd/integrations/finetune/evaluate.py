"""Scores of a model over whole sets, shared out among the ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sharded_spd.integrations.finetune.data import ImageSet
from sharded_spd.integrations.finetune.engine_base import Engine
from sharded_spd.integrations.finetune.tasks import Task


def evaluate(
    engine: Engine, task: Task, sets: Mapping[str, ImageSet], *, batch_size: int
) -> dict[str, float]:
    """The mean score of each set in percent, the same on every rank. Collective.

    Every rank runs the same number of batches, since a sharded model's forward is a collective: where its
    share is shorter it repeats its last example, which does not count.
    """
    world = engine.world
    sums = torch.zeros(len(sets), dtype=torch.float64, device=world.device)
    was_training = engine.model.training
    engine.model.eval()
    with torch.no_grad():
        for row, data in enumerate(sets.values()):
            count = len(data.labels)
            share = -(-count // world.size)
            mine = torch.arange(world.rank * share, (world.rank + 1) * share)
            for indices in mine.split(batch_size):
                scores = task.scores(engine.model, data, indices.clamp(max=count - 1))
                sums[row] += (scores * (indices < count).to(scores)).sum()
    engine.after_evaluation()
    engine.model.train(was_training)
    totals = world.sum_(sums).tolist()
    return {
        name: 100 * total / len(data.labels) for (name, data), total in zip(sets.items(), totals, strict=True)
    }
