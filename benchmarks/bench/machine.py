"""What the figures were measured on, and this process's memory."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def describe(device: str) -> dict[str, Any]:
    """Date, commit, hardware, versions, compiler."""
    found = find_spec("sharded_spd")
    if found is None or found.origin is None:
        raise RuntimeError("sharded_spd is not installed; run pip install -e '.[job]' in the checkout")
    package = Path(found.origin).resolve().parents[1]
    hardware: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": _meminfo("MemTotal"),
        "load_before": os.getloadavg()[0],
        "system": platform.platform(),
    }
    if device == "cuda":
        import torch

        hardware["gpu"] = torch.cuda.get_device_name()
    return {
        "command": " ".join(["python", *map(shlex.quote, sys.argv)]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _output("git", "-C", str(package), "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_output("git", "-C", str(package), "status", "--porcelain", "-uno")),
        "hardware": hardware,
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "compiler": _compiler(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")


def _compiler() -> str | None:
    """The one that builds the package's kernels."""
    found = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    text = _output(*found.split(), "--version") if found else None
    return text.splitlines()[0] if text else None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _meminfo(field: str) -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def free_memory(device: str) -> int:
    """Bytes that can still be had without paging."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    return _meminfo("MemAvailable")


def resident(field: str) -> int:
    """A field of /proc/self/status, bytes: VmRSS, VmHWM (its peak), RssAnon (without mapped files)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _give_back() -> None:
    """Have the allocator return what is free, so that it is not counted, and not used again unseen."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class MemoryWatch:
    """How much a block of code adds to this process's memory, and to its peak; on CUDA the allocator's."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self.held = self.peak = 0

    def __enter__(self) -> MemoryWatch:
        if self._cuda:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._held = self._peak = torch.cuda.memory_allocated()
        else:
            _give_back()
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            self._held, self._peak = resident("RssAnon"), resident("VmRSS")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._cuda:
            import torch

            torch.cuda.synchronize()
            held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        else:
            peak = resident("VmHWM")
            _give_back()
            held = resident("RssAnon")
        self.held, self.peak = held - self._held, peak - self._peak
