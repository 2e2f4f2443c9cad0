"""Settings of DeepSpeed that would make the projection wrong, or not run at all: refused, with a reason."""

from __future__ import annotations

from typing import Any

import torch

from sharded_spd.errors import UnsupportedError


def check_engine(engine: Any, *, defer: bool) -> None:
    """Refuse what is not exact.

    Raises:
        UnsupportedError: for the first such setting.
    """
    stage = engine.zero_optimization_stage()
    config = getattr(engine, "_config", None)
    zero = getattr(config, "zero_config", None)
    offload = getattr(zero, "offload_optimizer", None)
    place = str(getattr(getattr(offload, "device", None), "value", getattr(offload, "device", None)))
    wrapper = type(engine.optimizer).__name__
    if engine.optimizer is None or engine.basic_optimizer is None:
        raise UnsupportedError(
            "the DeepSpeed engine has no optimizer; wanted one from its JSON or from "
            "deepspeed.initialize(optimizer=...)"
        )
    if stage == 0 and getattr(engine, "fp16_enabled", bool)():
        raise UnsupportedError(
            "got fp16 at ZeRO stage 0, where DeepSpeed divides gradients by a loss scale that it never "
            "multiplied them with; wanted bf16, or stage 1, 2 or 3"
        )
    if getattr(config, "torch_autocast_enabled", False) and (
        getattr(config, "torch_autocast_dtype", None) is torch.float16
    ):
        raise UnsupportedError(
            "got torch_autocast with float16, where DeepSpeed clips gradients before it unscales them; "
            'wanted torch_autocast with bfloat16, or the block "fp16"'
        )
    if getattr(engine, "zenflow", False) or getattr(zero, "zenflow", None) is not None:
        raise UnsupportedError(
            "got ZenFlow, which updates weights outside of the optimizer's step; wanted plain "
            "offload_optimizer: remove zero_optimization.zenflow"
        )
    if getattr(offload, "super_offload", False):
        raise UnsupportedError(
            "got SuperOffload, which updates weights outside of the optimizer's step; wanted plain "
            "offload_optimizer: set offload_optimizer.super_offload to false"
        )
    ratio = getattr(offload, "ratio", 1.0)
    if ratio < 1.0:
        raise UnsupportedError(
            f"got offload_optimizer.ratio {ratio}, where a second optimizer steps a part of the "
            "layers; wanted 1.0"
        )
    if _tensor_parallel(engine):
        raise UnsupportedError(
            "got tensor parallelism (AutoTP or an mpu), where a rank sees only a slice of each layer's "
            "gradient and r would be that of the slice; wanted data parallelism alone, or FSDP2 with tensor "
            "parallelism"
        )
    if getattr(engine, "pipeline_parallelism", False):
        raise UnsupportedError("got a pipeline engine; wanted deepspeed.initialize without PipelineModule")
    if getattr(config, "elastic_checkpoint", False) or getattr(zero, "elastic_checkpoint", False):
        raise UnsupportedError(
            "got zero_optimization.elastic_checkpoint, which DeepSpeed cannot resume from; wanted false: "
            "use a universal checkpoint to resume at another world size"
        )
    if defer and place == "nvme" and stage == 3:
        raise UnsupportedError(
            "got defer: true with the optimizer offloaded to NVMe: a partition is swapped out before the "
            "last one has stepped; wanted defer: false"
        )
    if wrapper.startswith("ZenFlow") or wrapper.startswith("SuperOffload"):
        raise UnsupportedError(f"got {wrapper}, which is not known to step its inner optimizer")


def _tensor_parallel(engine: Any) -> bool:
    marks = ("tensor_model_parallel", "model_parallel")
    return getattr(engine, "autotp_size", int)() > 1 or any(
        getattr(p, mark, False) for p in engine.module.parameters() for mark in marks
    )
