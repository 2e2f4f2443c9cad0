"""One rank that steps with an anchor from a file, in a process of its own; prints what it cost in memory.

Usage: python -m tests.memory.disk_worker CHECKPOINT auto|disk
It prints a line once it has stepped, and ends when its standard input does.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import torch
from torch import nn

from sharded_spd import attach, load_config
from tests.memory.anchor_worker import memory

SHAPES = {"weight": (4096, 8192), "bias": (8192,)}


def stepping(shapes: dict[str, tuple[int, ...]]) -> tuple[torch.optim.Optimizer, nn.Module]:
    """SGD that takes no more memory from here on; its momentum leads away from an anchor of ones.

    The gradients are against it: that is when SPD pulls.
    """
    model = nn.Module()
    for name, shape in shapes.items():
        setattr(model, name, nn.Parameter(torch.full(shape, 0.5)))
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    optimizer.step()
    for p in model.parameters():
        p.grad = p.grad.mul_(-0.01)
    return optimizer, model


def main(path: str, device: str) -> None:
    torch.set_num_threads(1)
    small, its_model = stepping({"weight": (10, 10)})
    attach(small, its_model)
    small.step()  # whatever the first use loads is no part of it
    optimizer, model = stepping(SHAPES)
    with contextlib.suppress(OSError):  # without the reset the peak can only come out higher
        Path("/proc/self/clear_refs").write_text("5")
    anonymous, resident = memory("RssAnon"), memory("VmRSS")
    projector = attach(optimizer, model, load_config({"anchor": {"source": path, "device": device}}))
    for _ in range(2):
        optimizer.step()
    rate = projector.metrics()["activation_rate"]
    cost = {"anonymous": memory("RssAnon") - anonymous, "peak": memory("VmHWM") - resident, "rate": rate}
    print(json.dumps(cost), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
