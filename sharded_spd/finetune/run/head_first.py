"""Linear probing before fine-tuning (LP-FT, Kumar et al. 2022): the head is trained alone first."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sharded_spd.errors import ConfigError
from sharded_spd.finetune.config import JobConfig
from sharded_spd.finetune.data.examples import TrainSet
from sharded_spd.finetune.engines.registry import engine_factory
from sharded_spd.finetune.run.loop import StepReport, fit
from sharded_spd.finetune.run.methods import make_optimizer
from sharded_spd.finetune.tasks.loading import Loaded, Weights
from sharded_spd.finetune.tasks.registry import Task
from sharded_spd.finetune.world import StopRequest, World


def head_of(model: Any) -> list[str]:
    """The names of the parameters that are no part of the model's encoder.

    Raises:
        ConfigError: the model has no such parameter: its head is tied to the embeddings, or it has none.
    """
    inner = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    body = {id(p) for p in inner.parameters()} if isinstance(inner, torch.nn.Module) else None
    found = [name for name, p in model.named_parameters() if body is not None and id(p) not in body]
    if not found:
        raise ConfigError(
            f"head_first: {type(model).__name__} has no head of its own (or shares it with its embeddings): "
            "leave head_first out"
        )
    return found


def train_head(
    config: JobConfig,
    task: Task,
    checkpoint: Path,
    data: TrainSet,
    *,
    seed: int,
    empty: bool,
    to: Path,
    world: World,
    stop: StopRequest,
    on_step: Callable[[StepReport], None],
) -> None:
    """Train the head of `checkpoint`'s model as `head_first` says, and save it at `to`. Collective.

    Raises:
        Interrupted: on all ranks, if one of them was asked to stop.
        ConfigError: the model has no head of its own.
    """
    settings = config.head_first
    if settings is None:
        raise ConfigError("head_first: is not set")
    torch.manual_seed(seed)
    loaded = world.agree(lambda: task.load(checkpoint, seed=seed, empty=empty))
    head = set(head_of(loaded.model))
    for name, param in loaded.model.named_parameters():
        param.requires_grad_(name in head)
    weights = None if loaded.whole else Weights(loaded, checkpoint)
    engine = engine_factory(config.engine, world, settings)(loaded.model, weights)
    optimizer = make_optimizer(engine, settings, weight_decay=settings.adamw_weight_decay)
    prepared = engine.prepare(optimizer)
    if isinstance(prepared, torch.optim.Optimizer):
        optimizer = prepared
    fit(engine, optimizer, task, data, config=settings, seed=seed, stop=stop, on_step=on_step)
    tensors = {w.entry.name: w.gather() for w in engine.wholes() if w.entry.name in head}

    def save() -> None:
        if world.main:
            to.parent.mkdir(parents=True, exist_ok=True)
            beside = to.with_suffix(f".{os.getpid()}")
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, beside)
            os.replace(beside, to)

    world.agree(save)


def with_head(loaded: Loaded, head: Mapping[str, Tensor]) -> Loaded:
    """The model (modified in place) with a trained head in the place of its own."""
    if loaded.whole:
        with torch.no_grad():
            for name, values in head.items():
                loaded.model.get_parameter(name).copy_(values)
    names = {fqn: key for fqn, key in loaded.names.items() if fqn not in head}
    return replace(loaded, names=names, added={**loaded.added, **head})


def read_head(path: Path) -> dict[str, Tensor]:
    """What `train_head` saved, float32."""
    return {name: t.float() for name, t in load_file(path).items()}
