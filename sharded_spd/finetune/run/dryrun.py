"""What a job would do and need, without doing it: the model is only described, the data are read."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sharded_spd.errors import ConfigError
from sharded_spd.finetune.config import FROM_CHECKPOINT, PLAIN, JobConfig
from sharded_spd.finetune.data.examples import global_batches
from sharded_spd.finetune.engines.registry import ENGINES, check_engine
from sharded_spd.finetune.run.loop import total_steps
from sharded_spd.finetune.run.machine import free_memory, own_memory
from sharded_spd.finetune.run.shape import Shape, measure
from sharded_spd.finetune.tasks.checkpoint import check_checkpoint, weight_files
from sharded_spd.finetune.tasks.loading import Loaded
from sharded_spd.finetune.tasks.registry import Task, make_task
from sharded_spd.finetune.world import World

USED = 0.4
"""The share of the matrix multiplication rate that trainings commonly reach."""


@dataclass(frozen=True)
class Split:
    """Over how many ranks an engine splits what, and bytes of a parameter that it holds besides."""

    weights: int = 1
    gradients: int = 1
    optimizer: int = 1
    weight_bytes: int = 4
    gradient_bytes: int = 4
    master_bytes: int = 0


def dry_run(config: JobConfig, *, ranks: int) -> None:
    """Print engine, layout, anchor, steps, and an estimate of memory and time.

    Raises:
        ConfigError: what the job itself would find wrong before its first step.
    """
    if config.pretrain is not None:
        raise ConfigError("--dry-run: describes an existing checkpoint; this job makes its own first")
    directory = check_checkpoint(config.checkpoint or "", config.revision)
    task = make_task(config, torch.device("meta"))
    model_config = task.model_config(directory)
    data = task.splits(model_config, seed=config.seeds[0])
    steps = total_steps(data.train, config.train)
    loaded = task.load(directory, seed=config.seeds[0], empty=True)
    shape = _measure(config, task, loaded, data.train, ranks)
    split = split_of(config, ranks)
    rows = {
        "engine": f"{config.engine.name}, {ranks} rank(s)",
        "layout": _layout(split),
        "model": f"{type(loaded.model).__name__}, {shape.parameters:,} parameters, {shape.trained:,} trained",
        "loading": _loading(config, loaded),
        "methods": ", ".join(config.compare) + f"; seeds {', '.join(map(str, config.seeds))}",
        "steps": f"{steps:,} of {config.train.batch_size} examples, "
        f"{config.train.gradient_accumulation} part(s) each",
        **_anchor(config, loaded, directory, split),
        **_memory(config, shape, split, ranks),
        **_time(config, shape, steps, ranks),
    }
    for key, value in rows.items():
        print(f"{key + ':':<16} {value}")


def _measure(config: JobConfig, task: Task, loaded: Loaded, train: Any, ranks: int) -> Shape:
    share = math.ceil(config.train.batch_size / ranks)
    size = math.ceil(share / config.train.gradient_accumulation)
    alone = World(rank=0, size=1, device=torch.device("cpu"))
    batch = next(iter(global_batches(train, steps=1, batch_size=size, seed=0, world=alone, skip=0)))
    if config.train.activation_checkpointing:
        model: Any = loaded.model
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return measure(task, loaded.model, batch.take(torch.arange(batch.count)))


def split_of(config: JobConfig, ranks: int) -> Split:
    """How the engine of a job spreads weights, gradients and optimizer state."""
    name, options = config.engine.name, check_engine(config.engine)
    if name in ("single", "ddp"):
        return Split()
    if name in ("zero-redundancy", "fairscale-oss"):
        return Split(optimizer=ranks)
    if name != "deepspeed":
        strategy = getattr(options, "sharding_strategy", "full_shard")
        return Split() if strategy == "no_shard" else Split(ranks, ranks, ranks)
    json = options.load()
    stage = int(json.get("zero_optimization", {}).get("stage", 0))
    low = bool(json.get("bf16", {}).get("enabled") or json.get("fp16", {}).get("enabled"))
    size = 2 if low or (config.train.precision == "bfloat16" and "bf16" not in json) else 4
    return Split(ranks if stage == 3 else 1, ranks if stage >= 2 else 1, ranks if stage else 1, size, size, 4)


def _layout(split: Split) -> str:
    parts = {"weights": split.weights, "gradients": split.gradients, "optimizer": split.optimizer}
    return ", ".join(f"{name} {'whole' if n == 1 else f'1/{n}'}" for name, n in parts.items()) + " per rank"


def _loading(config: JobConfig, loaded: Loaded) -> str:
    sharded = config.load != "whole" and not loaded.whole
    sharded = sharded and ENGINES[config.engine.name].loads_shards(check_engine(config.engine))
    return "each rank reads its shards only" if sharded else "each rank reads the whole model, then splits it"


def _anchor(config: JobConfig, loaded: Loaded, directory: Path, split: Split) -> dict[str, str]:
    rules = [name for name in config.compare if name != PLAIN]
    if not rules:
        return {"anchor": "none: plain AdamW only"}
    anchor = config.spd_config(rules[0]).anchor
    source = _files(directory) if anchor.source == FROM_CHECKPOINT else str(anchor.source)
    size = {"bfloat16": 2, "float16": 2, "float32": 4}.get(anchor.dtype) or _stored_size(directory)
    held = sum(
        p.numel() * size
        for name, p in loaded.model.named_parameters()
        if p.requires_grad and ".lora_" not in name
    )
    where = {"disk": "mapped from disk", "cpu": "in host memory"}.get(anchor.device, "beside the weights")
    held = 0 if anchor.device == "disk" or source == "zero" else math.ceil(held / split.optimizer)
    zero = "; added weights at zero" if config.lora is not None else ""
    if loaded.added and config.lora is None:
        zero = f"; not in it: {', '.join(loaded.added)}"
    return {"anchor": f"{source}{zero}", "anchor per rank": f"{_bytes(held)}, {where}"}


def _files(directory: Path) -> str:
    """What is read: the one file, or how many there are."""
    files = weight_files(directory)
    return f"the file {files[0]}" if len(files) == 1 else f"{len(files)} files of {directory}"


def _stored_size(directory: Path) -> int:
    from sharded_spd.anchors.checkpoint import Checkpoint

    stored = Checkpoint(str(directory))
    sizes = [stored.tensor(name).dtype for name in stored.files()]
    return max((dtype.itemsize for dtype in sizes if dtype is not None), default=4)


def _memory(config: JobConfig, shape: Shape, split: Split, ranks: int) -> dict[str, str]:
    trained, every = shape.trained, shape.parameters
    parts = {
        "weights": every * split.weight_bytes / split.weights,
        "gradients": trained * split.gradient_bytes / split.gradients,
        "optimizer": trained * (8 + split.master_bytes) / split.optimizer,
    }
    if split.weights > 1:
        # A block and what is in none are whole while they are at work, with their gradients.
        size = 2 if config.train.precision == "bfloat16" else 4
        parts["gathered"] = 2 * (shape.largest_block + shape.outside) * size
    if PLAIN in config.compare:
        parts["adamw's start"] = trained * split.weight_bytes / split.weights
    if shape.activations is not None:
        parts["activations"] = shape.activations / (2 if config.train.precision == "bfloat16" else 1)
    on_gpu = _on_gpu(config)
    if not on_gpu:
        parts["the process itself"] = own_memory()
    listed = ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items())
    known = "" if shape.activations is not None else " and activations, which could not be told"
    free = float(torch.cuda.mem_get_info()[0]) if on_gpu else free_memory()
    total = sum(parts.values())
    warning = " MORE THAN IS FREE HERE" if total * (1 if on_gpu else ranks) > free else ""
    return {
        "memory per rank": f"about {_bytes(total)}{known} without the anchor ({listed}); "
        f"{_bytes(free)} free here{warning}"
    }


def _on_gpu(config: JobConfig) -> bool:
    return config.device != "cpu" and torch.cuda.is_available()


def _time(config: JobConfig, shape: Shape, steps: int, ranks: int) -> dict[str, str]:
    if shape.flops is None:
        return {"time": "could not be told"}
    on_gpu = _on_gpu(config)
    dtype = torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32
    per_rank = multiplication_rate(torch.device("cuda" if on_gpu else "cpu"), dtype)
    if not on_gpu:  # the ranks share this machine's processor, in which this process has some threads
        per_rank *= min(1.0, (os.cpu_count() or 1) / (ranks * torch.get_num_threads()))
    trainings = len(config.compare) * len(config.seeds)
    one = steps * config.train.gradient_accumulation * shape.flops / (per_rank * USED)
    return {
        "time": f"about {_duration(one * trainings)} for {trainings} training(s), without evaluations: "
        f"{shape.flops:.2g} FLOP per rank and part, at {USED:.0%} of the {per_rank:.2g} FLOP/s of a matrix "
        "multiplication here"
    }


def multiplication_rate(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP per second of a square matrix multiplication, timed for a quarter of a second."""
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    matrix @ matrix
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < 0.25:
        (matrix @ matrix)[0, 0].item()
        count += 1
    return 2.0 * size**3 * count / (time.perf_counter() - began)


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
