"""The training loop: batches that do not depend on the number of ranks, steps, and what happened in them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sharded_spd.errors import ConfigError
from sharded_spd.finetune.config import TrainConfig
from sharded_spd.finetune.data.examples import (
    GlobalBatch,
    TrainSet,
    global_batches,
    is_stream,
    share_of_batch,
)
from sharded_spd.finetune.engines.base import Engine
from sharded_spd.finetune.run.resume import Keeper
from sharded_spd.finetune.tasks.registry import Task
from sharded_spd.finetune.world import Interrupted, StopRequest


@dataclass(frozen=True)
class StepReport:
    """What is known after a logged step, the same on every rank; `loss` is the mean since the last one.

    `grad_norm` is that of the step, before clipping; None where the engine does not tell.
    """

    step: int
    steps: int
    epoch: float
    loss: float
    lr: float
    samples_per_second: float
    grad_norm: float | None = None


def total_steps(data: TrainSet | int, config: TrainConfig) -> int:
    """The number of optimizer steps in all epochs, or up to `max_steps`.

    Raises:
        ConfigError: a stream, whose end nobody knows, without `max_steps`.
    """
    if isinstance(data, int) or not is_stream(data):
        examples = data if isinstance(data, int) else len(data)
        steps = config.epochs * math.ceil(examples / config.batch_size)
        return steps if config.max_steps is None else min(steps, config.max_steps)
    if config.max_steps is None:
        raise ConfigError("train.max_steps: is required with data.streaming, whose length is not known")
    return config.max_steps


def evaluation_steps(steps: int, evaluations: int, every: int | None = None) -> set[int]:
    """After which steps to evaluate: evenly or `every` so many steps, the last step included."""
    if every is not None:
        return {*range(every, steps + 1, every), steps}
    return {max(1, round(steps * part / evaluations)) for part in range(1, evaluations + 1)}


def _schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> Any:
    warmup = config.warmup * steps

    def factor(step: int) -> float:
        if step < warmup:
            return min(1.0, (step + 1) / warmup)
        done = (step - warmup) / max(1.0, steps - warmup)
        if config.schedule == "constant":
            return 1.0
        return 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def fit(
    engine: Engine,
    optimizer: torch.optim.Optimizer,
    task: Task,
    data: TrainSet,
    *,
    config: TrainConfig,
    seed: int,
    stop: StopRequest,
    augment: Callable[[torch.Tensor, torch.Generator], torch.Tensor] | None = None,
    on_step: Callable[[StepReport], None],
    on_evaluation: Callable[[int, float], bool] | None = None,
    keeper: Keeper | None = None,
) -> None:
    """Train `engine.model` on `data`, collective; a seed gives the same batches on any number of ranks.

    `on_step` is called on every rank every `log_every` steps, `on_evaluation` with step and epoch at
    `evaluation_steps`; the training ends where it says so. A `keeper` first restores what it has, and saves
    when it is due and before a stop.

    Raises:
        Interrupted: on all ranks after the same step, if one of them was asked to stop.
        ConfigError: on all ranks, where one could not read its examples.
    """
    world, steps = engine.world, total_steps(data, config)
    evaluate_at = evaluation_steps(steps, config.evaluations, config.evaluate_every)
    schedule = _schedule(optimizer, config, steps)
    augmenting = torch.Generator().manual_seed(seed * 1000 + world.rank + 1)
    change = None if augment is None else (lambda images: augment(images, augmenting))
    begin = 0 if keeper is None else keeper.restore(schedule)
    epochs_per_step = 0.0 if is_stream(data) else 1 / math.ceil(len(data) / config.batch_size)
    # A stop may have come before it.
    if begin in evaluate_at and on_evaluation is not None and on_evaluation(begin, begin * epochs_per_step):
        return
    engine.model.train()
    running = torch.zeros(3, dtype=torch.float64, device=world.device)  # loss, steps, asked to stop
    since, seen = time.perf_counter(), 0
    batches = global_batches(
        data, steps=steps, batch_size=config.batch_size, seed=seed, world=world, skip=begin
    )
    for step, batch in enumerate(batches, start=begin + 1):
        running[0] += _forward_and_backward(engine, task, batch, config.gradient_accumulation, change)
        lr = optimizer.param_groups[0]["lr"]
        norm = engine.step(optimizer, max_grad_norm=config.max_grad_norm)
        schedule.step()
        seen += batch.count
        running[1] += 1
        due = keeper is not None and keeper.due(step) and step < steps
        if step % config.log_every and step not in evaluate_at and not due:
            continue
        running[2] = stop.flag
        total, count, stops = world.sum_(running).tolist()
        report = StepReport(
            step=step,
            steps=steps,
            epoch=step * epochs_per_step,
            loss=total / count,
            lr=float(lr),
            samples_per_second=seen / (time.perf_counter() - since),
            grad_norm=None if norm is None else float(norm),
        )
        running.zero_()
        on_step(report)
        paused = time.perf_counter()
        enough = False
        if on_evaluation is not None and step in evaluate_at and not stops:
            enough = on_evaluation(step, report.epoch)
        if keeper is not None and (due or stops):
            keeper.save(step, schedule)
        since += time.perf_counter() - paused
        if stops:
            if keeper is not None:
                keeper.wait()
            raise Interrupted
        if enough:
            return


def _forward_and_backward(
    engine: Engine, task: Task, batch: GlobalBatch, parts: int, change: Callable[..., Any] | None
) -> torch.Tensor:
    """The gradients of a batch, part by part, and this rank's share of its loss."""
    world = engine.world
    shares = share_of_batch(batch.count, world, units=batch.units, parts=parts)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for part, (places, weights) in enumerate(shares, start=1):
        last = part == parts
        read = partial(batch.take, places)
        examples = world.agree(read) if batch.lazy else read()
        with engine.part(last=last):
            with engine.autocast():
                loss = (task.losses(engine.model, examples, augment=change) * weights).sum()
            engine.backward(loss, last=last)
        total += loss.detach()
    return total
