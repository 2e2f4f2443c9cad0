"""Runs fairscale's FullyShardedDataParallel on CPU and gloo: its CUDA streams stand still."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch


class _Stream:
    def wait_stream(self, other: Any) -> None:
        """Nothing runs beside."""

    def synchronize(self) -> None:
        """Nothing is under way."""


def install() -> None:
    """For the rest of this process. gloo lacks the reduce-scatter that fairscale prefers."""
    os.environ["ENABLE_NCCL_BASE_COLLECTIVES"] = "0"  # read when fairscale is imported
    from fairscale.nn.data_parallel import FullyShardedDataParallel

    if getattr(FullyShardedDataParallel, "_on_cpu", False):
        return
    stream, setup = _Stream(), FullyShardedDataParallel._setup_streams

    def set_up_streams(self: Any) -> None:
        if len(self._streams) > 0 or not self._is_root:
            return
        setup(self)  # makes the reducer, and shares `_streams` with the units below
        for name in ("fp32_to_fp16", "all_gather", "post_backward"):
            self._streams[name] = stream

    FullyShardedDataParallel._setup_streams = set_up_streams
    FullyShardedDataParallel._on_cpu = True
    torch.cuda.current_stream = lambda *_, **__: stream  # type: ignore[assignment,return-value]
    torch.cuda.stream = lambda *_, **__: contextlib.nullcontext()  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_, **__: None  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign,assignment]
