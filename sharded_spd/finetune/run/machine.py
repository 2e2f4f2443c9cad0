"""On what a job runs: versions and hardware, for the record of the run."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib import metadata
from pathlib import Path
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


def own_memory() -> float:
    """Bytes that this process holds now, libraries included."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # no Linux
        return peak_memory(torch.device("cpu"))["host_gib"] * 2**30
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def free_memory() -> float:
    """Bytes of the machine that a process can have, what is kept of files included."""
    try:
        known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return float(known["MemAvailable"].split()[0]) * 2**10
    except (OSError, KeyError):  # no Linux
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
