"""Times of steps and of their collectives, and what goes over the wire."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Stopwatch:
    """Seconds between start and stop; on CUDA by events, so that nothing waits in between."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"

    def start(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        begin = torch.cuda.Event(enable_timing=True)
        begin.record()
        return begin

    def stop(self, begin: Any) -> Any:
        """What `seconds` turns into a number, later."""
        if not self._cuda:
            return time.perf_counter() - begin
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        return begin, end

    def seconds(self, span: Any) -> float:
        """Waits for the device."""
        if not self._cuda:
            return float(span)
        begin, end = span
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


class AllReduceWatch:
    """Times the calls of `torch.distributed.all_reduce` in a block: what the step has to wait for them."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch
        self._spans: list[Any] = []

    def __enter__(self) -> AllReduceWatch:
        self._spans = []
        self._real = dist.all_reduce

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self._watch.start()
            result = self._real(*args, **kwargs)
            self._spans.append(self._watch.stop(begin))
            return result

        dist.all_reduce = timed
        return self

    def __exit__(self, *exc: object) -> None:
        dist.all_reduce = self._real

    def seconds(self) -> float:
        """Of all calls of the block."""
        return sum(self._watch.seconds(span) for span in self._spans)


class Wire(TorchDispatchMode):
    """Counts the collectives of a block and the bytes that this rank gives to them.

    `seconds` is the time within those that DTensor issues, waiting included (host clock). It slows the
    block down, so nothing else is timed with it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self.payload_bytes = 0
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, op = func._schema.name.partition("::") if hasattr(func, "_schema") else ("", "", "")
        functional = space in ("_c10d_functional", "c10d_functional")
        if not functional and space != "c10d":
            return func(*args, **(kwargs or {}))
        if not op.startswith(("wait", "_wrap", "barrier")):
            name = op.rstrip("_")
            self.calls[name] = self.calls.get(name, 0) + 1
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
            self.payload_bytes += sum(t.numel() * t.element_size() for t in tensors)
        begin = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        if functional:
            self.seconds += time.perf_counter() - begin
        return result

    @property
    def all_reduces(self) -> int:
        return sum(
            count for name, count in self.calls.items() if name.startswith(("allreduce", "all_reduce"))
        )
