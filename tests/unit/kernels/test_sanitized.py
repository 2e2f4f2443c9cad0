"""The compiled kernels under gcc's address and undefined-behaviour sanitizers, which see each access."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
OTHERS = ("-k", "not without_compiler")  # they ask for no kernels
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g -O1"
OUTSIDE = """
import ctypes, struct, torch
from sharded_spd.kernels.compile import load_library
weight, out = torch.zeros(16), torch.empty(1, 2, dtype=torch.float64)
row = struct.pack("=8qd", weight.data_ptr(), 0, 0, 1, 0, 0, 64, 0, 1.0)  # says 64 elements
place, one = ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(1)
load_library().spd_sums(row, one, one, place, place, 1, 0)
"""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def sanitized(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with kernels that check each access. The C++ library comes first, for torch's exceptions."""
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.fail("the sanitizers need gcc")
    libraries = [
        subprocess.run(
            [gcc, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "CC": f"{gcc} {FLAGS}",
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:alloc_dealloc_mismatch=0:handle_segv=0",
        "XDG_CACHE_HOME": str(tmp_path),
        "SHARDED_SPD_KERNELS": "cpu",
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_every_access_is_within_bounds(tmp_path: Path) -> None:
    """Of all that the kernels' own tests do."""
    files = [
        "tests/unit/kernels/test_choose.py",
        "tests/unit/optim/test_fused_adam.py",
        "tests/unit/projection/test_roster.py",
    ]
    done = sanitized(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", *OTHERS, *files)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert list(tmp_path.glob("sharded_spd/kernels/cpu-*.so"))


def test_an_access_out_of_bounds_is_seen(tmp_path: Path) -> None:
    """The control: without it the one above could pass unseen."""
    done = sanitized(tmp_path, "-c", OUTSIDE)
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
    assert "spd_sums" in done.stderr
