"""An anchor on disk takes no memory of its own, and two ranks share the pages of its file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.memory.anchor_worker import MIB
from tests.memory.disk_worker import SHAPES

ROOT = Path(__file__).parents[2]
ANCHOR = sum(4 * prod(shape) for shape in SHAPES.values())
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Iterator[Path]:
    """128 MiB of ones; removed afterwards, since pytest keeps its folders."""
    path = tmp_path_factory.mktemp("disk") / "model.safetensors"
    save_file({name: torch.ones(shape) for name, shape in SHAPES.items()}, path)
    yield path
    path.unlink()


@contextmanager
def ranks(checkpoint: Path, device: str, count: int) -> Iterator[list[tuple[dict, int]]]:
    """What each of `count` processes reports after its steps, and its id; they live as long as the block."""
    command = [sys.executable, "-m", "tests.memory.disk_worker", str(checkpoint), device]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(count)]
    try:
        yield [(json.loads(process.stdout.readline()), process.pid) for process in started]
    finally:
        for process in started:
            process.communicate("", timeout=60)
    assert [process.returncode for process in started] == [0] * count


def mapped(pid: int, path: Path) -> dict[str, int]:
    """The fields of smaps, in bytes, of the one map of `path`."""
    entries = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text(), flags=re.M)
    (entry,) = [entry for entry in entries if entry.splitlines()[:1] and str(path) in entry.splitlines()[0]]
    return {name: int(n) * 1024 for name, n in re.findall(r"^(\w+): +(\d+) kB$", entry, flags=re.M)}


def test_no_memory_of_its_own_and_shared_pages(checkpoint):
    with ranks(checkpoint, "disk", 2) as found:
        for cost, pid in found:
            assert cost["rate"] > 0
            print(f"anonymous {cost['anonymous'] / MIB:.1f} MiB, peak {cost['peak'] / MIB:.1f} MiB")
            assert cost["anonymous"] < 48 * MIB  # chunks of all sizes, which malloc keeps
            assert cost["peak"] < ANCHOR + 64 * MIB  # with the file's pages, which are not this rank's
            file = mapped(pid, checkpoint)
            print({name: file[name] // 1024 for name in ("Rss", "Pss", "Private_Clean", "Anonymous")})
            assert file["Rss"] > 0.99 * ANCHOR
            assert file["Pss"] < 0.6 * file["Rss"]
            assert file["Anonymous"] == file["Private_Dirty"] == 0


def test_the_measure_notices_an_anchor_in_memory(checkpoint):
    """The control: without it a measure that always shows little would pass above."""
    with ranks(checkpoint, "auto", 1) as [(cost, _)]:
        assert cost["rate"] > 0
        assert cost["anonymous"] > 0.99 * ANCHOR
