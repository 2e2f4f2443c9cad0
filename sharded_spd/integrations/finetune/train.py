"""The training loop: batches that do not depend on the number of ranks, steps, and what happened in them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sharded_spd.integrations.finetune.config import TrainConfig
from sharded_spd.integrations.finetune.data import ImageSet
from sharded_spd.integrations.finetune.engine_base import Engine
from sharded_spd.integrations.finetune.resume import Keeper
from sharded_spd.integrations.finetune.tasks import Task
from sharded_spd.integrations.finetune.world import Interrupted, StopRequest, World


@dataclass(frozen=True)
class StepReport:
    """What is known after a logged step, the same on every rank; `loss` is the mean since the last one."""

    step: int
    steps: int
    epoch: float
    loss: float
    lr: float
    samples_per_second: float


def total_steps(examples: int, config: TrainConfig) -> int:
    """The number of optimizer steps in all epochs."""
    return config.epochs * math.ceil(examples / config.batch_size)


def evaluation_steps(steps: int, evaluations: int) -> set[int]:
    """After which steps to evaluate: `evaluations` times, evenly, the last step included."""
    return {max(1, round(steps * part / evaluations)) for part in range(1, evaluations + 1)}


def _batches(examples: int, config: TrainConfig, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(config.epochs):
        yield from torch.randperm(examples, generator=generator).split(config.batch_size)


def share_of_batch(batch: torch.Tensor, world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of a batch, equally long on all ranks, and each example's weight in the mean over all.

    Engines average over ranks, so a weight is ranks / batch; what fills up a short part weighs nothing.
    """
    length = -(-len(batch) // world.size)
    places = torch.arange(world.rank * length, (world.rank + 1) * length)
    weights = (places < len(batch)).to(torch.float32) * (world.size / len(batch))
    return batch[places.clamp(max=len(batch) - 1)], weights.to(world.device)


def _schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> Any:
    warmup = config.warmup * steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1.0, steps - warmup)
        if config.schedule == "constant":
            return 1.0
        return 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def fit(
    engine: Engine,
    optimizer: torch.optim.Optimizer,
    task: Task,
    data: ImageSet,
    *,
    config: TrainConfig,
    seed: int,
    stop: StopRequest,
    augment: Callable[[torch.Tensor, torch.Generator], torch.Tensor] | None = None,
    on_step: Callable[[StepReport], None],
    on_evaluation: Callable[[int, float], None] | None = None,
    keeper: Keeper | None = None,
) -> None:
    """Train `engine.model` on `data`, collective; a seed gives the same batches on any number of ranks.

    `on_step` is called on every rank every `log_every` steps, `on_evaluation` with step and epoch at
    `evaluation_steps`. A `keeper` first restores what it has, and saves when it is due and before a stop.

    Raises:
        Interrupted: on all ranks after the same step, if one of them was asked to stop.
    """
    world, examples = engine.world, len(data.labels)
    steps = total_steps(examples, config)
    evaluate_at = evaluation_steps(steps, config.evaluations)
    schedule = _schedule(optimizer, config, steps)
    augmenting = torch.Generator().manual_seed(seed * 1000 + world.rank + 1)
    change = None if augment is None else (lambda images: augment(images, augmenting))
    begin = 0 if keeper is None else keeper.restore(schedule)
    if begin in evaluate_at and on_evaluation is not None:
        on_evaluation(begin, begin * config.epochs / steps)  # a stop may have come before it
    engine.model.train()
    running = torch.zeros(3, dtype=torch.float64, device=world.device)  # loss, steps, asked to stop
    since, seen = time.perf_counter(), 0
    for step, batch in enumerate(_batches(examples, config, seed), start=1):
        if step <= begin:
            continue
        indices, weights = share_of_batch(batch, world)
        loss = (task.losses(engine.model, data, indices, augment=change) * weights).sum()
        engine.backward(loss)
        lr = optimizer.param_groups[0]["lr"]
        engine.step(optimizer, max_grad_norm=config.max_grad_norm)
        schedule.step()
        seen += len(batch)
        running[0] += loss.detach()
        running[1] += 1
        due = keeper is not None and keeper.due(step) and step < steps
        if step % config.log_every and step not in evaluate_at and not due:
            continue
        running[2] = stop.flag
        total, count, stops = world.sum_(running).tolist()
        report = StepReport(
            step=step,
            steps=steps,
            epoch=step * config.epochs / steps,
            loss=total / count,
            lr=float(lr),
            samples_per_second=seen / (time.perf_counter() - since),
        )
        running.zero_()
        on_step(report)
        paused = time.perf_counter()
        if on_evaluation is not None and step in evaluate_at and not stops:
            on_evaluation(step, report.epoch)
        if keeper is not None and (due or stops):
            keeper.save(step, schedule)
        since += time.perf_counter() - paused
        if stops:
            if keeper is not None:
                keeper.wait()
            raise Interrupted
