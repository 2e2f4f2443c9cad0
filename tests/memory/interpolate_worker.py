"""One interpolation in a process of its own; prints what it cost in memory.

Usage: python -m tests.memory.interpolate_worker FIRST SECOND TARGET
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import torch

from sharded_spd.anchors.tools.interpolate import between, plan, write
from tests.memory.anchor_worker import memory

if __name__ == "__main__":
    torch.set_num_threads(1)
    between(torch.ones(3), torch.ones(3), 0.3).to(torch.float32)  # what the first use loads is no part of it
    found = plan(sys.argv[1], sys.argv[2])
    with contextlib.suppress(OSError):  # without the reset the peak can only come out higher
        Path("/proc/self/clear_refs").write_text("5")
    baseline = memory("VmRSS")
    write(found, sys.argv[3], 0.3)
    print(json.dumps({"increase": memory("VmHWM") - baseline, "written": found.num_bytes}))
