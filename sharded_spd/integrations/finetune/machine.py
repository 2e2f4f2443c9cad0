"""On what a job runs: versions and hardware, for the record of the run."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib import metadata
from typing import Any

import torch

_LIBRARIES = ("sharded_spd", "torch", "transformers", "datasets", "deepspeed", "fairscale", "peft", "triton")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Versions of the libraries that are installed, and the machine of this rank."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    machine = {
        "host": platform.node(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
    }
    return {"versions": versions, "machine": machine}


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most memory that this process has held so far, in GiB."""
    # Linux counts in KiB, macOS in bytes.
    unit = 2**30 if sys.platform == "darwin" else 2**20
    found = {"host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)}
    if device.type == "cuda":
        found["device_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    return found
