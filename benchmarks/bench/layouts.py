"""What one rank among many pays before the first step, seen through a process group that only pretends.

torch's fake process group has any number of ranks in one process: its collectives end at once and move
nothing. So times are of this rank's own work; what the network adds is computed, not measured.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench.case import LayoutCase
from bench.clocks import Wire
from bench.gradients import local
from bench.llama import THIN, Llama, Shape, elements_per_rank, split
from bench.machine import MemoryWatch, free_memory

SHAPES = {"llama-70b": Shape(), "thin": THIN, "tiny": Shape(2, 64, 128, 8, 8, 256)}
"""The first two have as many tensors."""


def run_layout(rank: int, folder: Path, case: LayoutCase) -> dict[str, Any]:
    """Build, bind, step twice; times in seconds, memory in bytes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(case.threads)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    me = case.world // 3
    dist.init_process_group("fake", store=FakeStore(), rank=me, world_size=case.world)
    times: dict[str, float] = {}
    with torch.device("meta"):
        model = Llama(SHAPES[case.model])
    shapes = [tuple(p.shape) for p in model.parameters()]
    elements = sum(map(prod, shapes))
    result: dict[str, Any] = {
        "case": asdict(case), "rank": me, "elements": elements, "layers": len(shapes), "seconds": times
    }  # fmt: skip
    # Weights, anchor, gradients, two moments, and as much again as one of them.
    need = 24 * elements_per_rank(elements, case.engine, case.world) + 2**29
    if need > 0.75 * free_memory("cpu"):
        result["skipped"] = f"needs {need / 2**30:.1f} GiB, {free_memory('cpu') / 2**30:.1f} GiB are free"
        return result
    began = time.perf_counter()
    split(model, case.engine, case.world)
    times["splitting by torch"] = time.perf_counter() - began
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        local(p).uniform_(-0.03, 0.03, generator=generator)
    result["local_elements"] = sum(local(p).numel() for p in model.parameters())
    _bind(model, result)
    dist.destroy_process_group()
    return result


def _bind(model: Llama, result: dict[str, Any]) -> None:
    from sharded_spd import SPDConfig, attach
    from sharded_spd.engines.plain import ParameterAdapter
    from sharded_spd.projection.reduction import Verdict

    # Ranks that only pretend say nothing in a reduction, not even that they are there.
    Verdict.read = lambda *_, **__: None
    times = result["seconds"]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    adapter = ParameterAdapter([optimizer], model)
    runs = []
    for _ in range(3):
        began = time.perf_counter()
        layout = adapter.layout(model)
        runs.append(time.perf_counter() - began)
    times["layout, first"], times["layout"] = runs[0], min(runs)
    if layout is None:
        raise RuntimeError("the layout could not be made; wanted parameters that hold values")
    result["scopes"] = [{"ranks": s.group.size(), "layers": len(s.layers)} for s in layout.scopes]
    with MemoryWatch("cpu") as memory:
        began, began_cpu = time.perf_counter(), time.process_time()
        projector = attach(optimizer, model, SPDConfig(weight_decay=1.0))
        times["attach in full"] = time.perf_counter() - began
        times["attach in full, processor"] = time.process_time() - began_cpu
    result["memory"] = {
        "weights": sum(local(p).nbytes for p in model.parameters()),
        "held by attach": memory.held,
        "peak of attach": memory.peak,
    }
    with Wire() as wire:
        projector.bind(model)
    result["binding"] = {"collectives": wire.calls, "payload_bytes": wire.payload_bytes}
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)
    optimizer.step()  # the first one also checks the snapshot
    with Wire() as wire:
        optimizer.step()
    result["step"] = {
        "all_reduces": wire.all_reduces, "collectives": wire.calls, "payload_bytes": wire.payload_bytes
    }  # fmt: skip
    began = time.perf_counter()
    optimizer.step()
    times["step, this rank's work"] = time.perf_counter() - began
