"""Refuses DeepSpeed settings under which the projection would be wrong or would not run, with a reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sharded_spd.errors import UnsupportedError


def check_engine(engine: Any, *, per_step: bool) -> None:
    """Refuse settings under which the projection is not exact.

    Raises:
        UnsupportedError: the first such setting.
    """
    for is_on, message in _objections(engine, per_step=per_step):
        if is_on:
            raise UnsupportedError(message)


def _objections(engine: Any, *, per_step: bool) -> Iterator[tuple[bool, str]]:
    """Whether each setting is on, and the error message."""
    stage = engine.zero_optimization_stage()
    config = getattr(engine, "_config", None)
    zero = getattr(config, "zero_config", None)
    offload = getattr(zero, "offload_optimizer", None)
    ratio = getattr(offload, "ratio", 1.0)
    inner = type(engine.basic_optimizer).__name__
    elsewhere = "which updates weights outside of the optimizer's step; wanted plain offload_optimizer"
    yield (
        engine.optimizer is None or engine.basic_optimizer is None,
        "the DeepSpeed engine has no optimizer; wanted one from its JSON or from "
        "deepspeed.initialize(optimizer=...)",
    )
    yield (
        getattr(engine, "pipeline_parallelism", False),
        "got a pipeline engine; wanted deepspeed.initialize without a PipelineModule",
    )
    yield (
        stage == 0 and getattr(engine, "fp16_enabled", bool)(),
        "got fp16 at ZeRO stage 0, where DeepSpeed divides gradients by a loss scale that it never "
        "multiplied them with; wanted bf16, or stage 1, 2 or 3",
    )
    autocast = getattr(config, "torch_autocast_enabled", False)
    yield (
        autocast and getattr(config, "torch_autocast_dtype", None) is torch.float16,
        "got torch_autocast with float16, where DeepSpeed clips gradients before it unscales them; wanted "
        'torch_autocast with bfloat16, or the block "fp16"',
    )
    yield (
        getattr(zero, "zenflow", None) is not None or getattr(engine, "zenflow", False),
        f"got ZenFlow, {elsewhere}: remove zero_optimization.zenflow",
    )
    yield (
        getattr(offload, "super_offload", False),
        f"got SuperOffload, {elsewhere}: set offload_optimizer.super_offload to false",
    )
    yield (
        ratio < 1.0,
        f"got offload_optimizer.ratio {ratio}, where a second optimizer steps a part of the layers; wanted 1",
    )
    yield (
        inner.startswith("Muon"),
        f"got {inner}, for which DeepSpeed puts the update in the gradient's place; wanted an optimizer that "
        "is handed gradients",
    )
    yield (
        _tensor_parallel(engine),
        "got tensor parallelism (AutoTP or an mpu), where a rank sees a slice of each layer's gradient and r "
        "would be that of the slice; wanted data parallelism alone, or FSDP2 with tensor parallelism",
    )
    yield (
        getattr(zero, "elastic_checkpoint", False),
        "got zero_optimization.elastic_checkpoint, which DeepSpeed cannot resume from; wanted false: a "
        "universal checkpoint resumes at another world size",
    )
    yield (
        per_step and stage == 3 and _device(offload) == "nvme",
        "got reduction: per_step with the optimizer offloaded to NVMe, where a partition is swapped out "
        "before the last one has stepped; wanted per_inner_step",
    )


def _device(offload: Any) -> str:
    device = getattr(offload, "device", None)
    return str(getattr(device, "value", device))


def _tensor_parallel(engine: Any) -> bool:
    marks = ("tensor_model_parallel", "model_parallel")
    return getattr(engine, "autotp_size", int)() > 1 or any(
        getattr(p, mark, False) for p in engine.module.parameters() for mark in marks
    )
