"""A recipe's own pre-trained checkpoint: trained once, then cached under a hash of its recipe."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sharded_spd.config.loading import choice
from sharded_spd.errors import ConfigError
from sharded_spd.finetune.config import JobConfig, PretrainConfig
from sharded_spd.finetune.data.corruptions import AUGMENTATIONS
from sharded_spd.finetune.engines.registry import engine_factory
from sharded_spd.finetune.metrics import make_metrics
from sharded_spd.finetune.run.evaluate import evaluate
from sharded_spd.finetune.run.loop import StepReport, fit
from sharded_spd.finetune.run.methods import make_optimizer
from sharded_spd.finetune.tasks.loading import Kind
from sharded_spd.finetune.tasks.registry import Task
from sharded_spd.finetune.world import StopRequest, World

_RECIPE_VERSION = 1  # another number whenever the code here makes another checkpoint of the same settings


def cached_checkpoint(config: JobConfig, pretrain: PretrainConfig, *, ranks: int) -> Path:
    """Where the checkpoint of this recipe is, or will be: named after a hash of all that goes into it."""
    recipe = asdict(pretrain)
    for name in ("cache_dir", "min_accuracy"):
        del recipe[name]
    text = json.dumps(
        [_RECIPE_VERSION, config.task, asdict(config.data), recipe, ranks, torch.__version__], sort_keys=True
    )
    base = pretrain.cache_dir or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "sharded_spd"
    )
    return (
        Path(base)
        / f"{pretrain.model_type}-{config.data.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    )


def make_checkpoint(
    config: JobConfig,
    pretrain: PretrainConfig,
    task: Task,
    *,
    to: Path,
    world: World,
    stop: StopRequest,
    on_step: Callable[[StepReport], None],
) -> float:
    """Pre-train as `pretrain` says, save the checkpoint at `to`, and return its validation accuracy.

    Raises:
        ConfigError: there is no pre-training set, or the result is below `min_accuracy` (nothing is saved).
    """
    augment = _augmentation(pretrain.augment)
    torch.manual_seed(pretrain.seed)
    model = task.new_model(pretrain)
    kind = Kind.of(model)
    splits = world.agree(lambda: task.splits(kind.config, seed=0))
    if splits.pretrain is None:
        raise ConfigError(
            f"pretrain: data {config.data.name} has no set to pre-train on; give a checkpoint instead"
        )
    engine = engine_factory(pretrain.engine, world, pretrain.train)(model, None)
    optimizer = make_optimizer(engine, pretrain.train, weight_decay=pretrain.train.adamw_weight_decay)
    engine.prepare(optimizer)
    fit(
        engine,
        optimizer,
        task,
        splits.pretrain,
        config=pretrain.train,
        seed=pretrain.seed,
        stop=stop,
        augment=augment,
        on_step=on_step,
    )
    held_out = splits.validation or splits.test
    metrics = make_metrics(("accuracy",), known=("accuracy",))
    scores = evaluate(
        engine, task, {"held out": held_out}, metrics=metrics, batch_size=config.eval_batch_size
    )
    accuracy = scores["held out"]["accuracy"]
    if accuracy < 100 * pretrain.min_accuracy:
        raise ConfigError(
            f"pretrain.min_accuracy: wanted {pretrain.min_accuracy:.0%} on held-out images, got "
            f"{accuracy:.1f} %; train it longer or lower the bar"
        )
    task.save_model(kind, engine.wholes(), to)
    return accuracy


def _augmentation(name: str) -> Any:
    if name not in AUGMENTATIONS:
        raise choice("pretrain.augment", name, list(AUGMENTATIONS))
    return AUGMENTATIONS[name]
