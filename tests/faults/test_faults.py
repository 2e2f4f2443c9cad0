"""Ranks that are killed, stopped or cannot write, at every moment of a step and of a save.

After each: the survivors end with a message, the last complete checkpoint loads, and the training that goes
on from it ends bit for bit as one that was never disturbed.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharded_spd.checkpoint.folder import find_latest, steps_in
from tests.faults.training import EVERY, RANKS, SECONDS, STEPS, Fault, finish, logs, start

KILLED = -signal.SIGKILL
SECOND = rf"step-{2 * EVERY:08d}"
"""The checkpoint in whose making most faults happen; the one before it must be there afterwards."""

FAULTS: dict[str, tuple[Fault, int]] = {
    # In a step.
    "first-step": (Fault(1, "step", "1"), 0),
    "step-rank0": (Fault(0, "step", str(EVERY + 2)), EVERY),
    "step-rank1": (Fault(1, "step", str(EVERY + 2)), EVERY),
    # Before a save has made anything, and when its folder is there and empty.
    "before": (Fault(0, "os.mkdir", rf"\.{SECOND}\..*part"), EVERY),
    "empty-rank0": (Fault(0, "open", rf"{SECOND}.*rank00000"), EVERY),
    "empty-rank1": (Fault(1, "open", rf"{SECOND}.*rank00001"), EVERY),
    # In the middle of a rank's file: its length, its header, its data, its last byte.
    "length": (Fault(1, "bytes", "5"), EVERY),
    "header": (Fault(1, "bytes", "300"), EVERY),
    "data": (Fault(1, "bytes", "15000"), EVERY),
    # Ranks' files done, the rest not; the marker not there, or there and empty.
    "metadata": (Fault(0, "open", rf"{SECOND}.*metadata\.json"), EVERY),
    "metadata-data": (Fault(0, "open", rf"{SECOND}.*metadata\.json", count=2), EVERY),
    "marker": (Fault(0, "open", rf"{SECOND}.*complete\.json"), EVERY),
    # All is written and has not its name yet; it has it, and is not on the disk yet.
    "rename": (Fault(0, "os.rename", rf"\.{SECOND}\..*part"), EVERY),
    "renamed": (Fault(0, "open", r"run$", count=2), 2 * EVERY),
    # The oldest of three is being dropped: its marker, its files.
    "drop-marker": (Fault(0, "os.remove", rf"step-{EVERY:08d}/complete\.json"), 3 * EVERY),
    "drop-files": (Fault(0, "shutil.rmtree", rf"step-{EVERY:08d}"), 3 * EVERY),
}
QUICK = {"step-rank1", "data", "rename", "renamed", "drop-files"}


def _shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a training that nothing happens to ends with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert finish(start(folder)) == [0] * RANKS, logs(folder)
    return (folder / "trained.safetensors").read_bytes()


@pytest.fixture(autouse=True)
def _leaves_nothing_in_shared_memory() -> Iterator[None]:
    before = _shared_memory()
    yield
    assert _shared_memory() <= before


def _goes_on(folder: Path, undisturbed: bytes, *, step: int, asynchronous: bool = False) -> None:
    """From the checkpoint of `step`, to the very end of the undisturbed training, and tidily."""
    found = find_latest(folder / "run").path
    assert (found is None) == (step == 0)
    assert found is None or found.name == f"step-{step:08d}"
    assert finish(start(folder, asynchronous=asynchronous)) == [0] * RANKS, logs(folder)
    assert f"begins after step {step}" in logs(folder)
    assert (folder / "trained.safetensors").read_bytes() == undisturbed
    kept = [f"step-{STEPS - EVERY:08d}", f"step-{STEPS:08d}"]
    assert sorted(path.name for path in (folder / "run").iterdir()) == kept


@pytest.mark.parametrize("asynchronous", [False, True], ids=["", "async"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FAULTS]
)
def test_killed(name: str, asynchronous: bool, tmp_path: Path, undisturbed: bytes) -> None:
    """SIGKILL, or SIGXFSZ from the kernel in the middle of a write."""
    fault, step = FAULTS[name]
    ranks = start(tmp_path, fault=fault, asynchronous=asynchronous)
    codes = finish(ranks, seconds=SECONDS + 20)
    assert codes[fault.rank] == (-signal.SIGXFSZ if fault.when == "bytes" else KILLED), logs(tmp_path)
    assert codes[1 - fault.rank] == 1, logs(tmp_path)
    assert re.search("Connection (closed|reset) by peer|Timed out", logs(tmp_path))
    if asynchronous and fault.when in ("step", "bytes"):
        step = find_step(tmp_path)  # the save before may or may not be done by then
        assert step in (0, EVERY)
    _goes_on(tmp_path, undisturbed, step=step, asynchronous=asynchronous)


def find_step(folder: Path) -> int:
    """The step of the newest complete checkpoint, 0 without one."""
    found = find_latest(folder / "run").path
    return 0 if found is None else int(found.name.removeprefix("step-"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize(
    ("rank", "event", "place"),
    [(1, "open", rf"{SECOND}.*rank00001"), (0, "os.mkdir", rf"{SECOND}"), (0, "os.rename", rf"{SECOND}")],
    ids=["file", "folder", "rename"],
)
def test_failing_write(
    number: int, rank: int, event: str, place: str, tmp_path: Path, undisturbed: bytes
) -> None:
    """An error of the operating system, on one rank: both say so, and the checkpoint before is there."""
    fault = Fault(rank, event, place, number)
    assert finish(start(tmp_path, fault=fault)) == [1] * RANKS
    for own in range(RANKS):
        text = (tmp_path / f"rank{own}.log").read_text()
        assert f"rank {rank}: OSError: [Errno {number}] {os.strerror(number)}" in text
    assert [path.name for _, path in steps_in(tmp_path / "run")] == [f"step-{EVERY:08d}"]
    _goes_on(tmp_path, undisturbed, step=EVERY)


def test_slow_rank(tmp_path: Path, undisturbed: bytes) -> None:
    """Stopped for a while in the middle of a step: the others wait, and nothing changes."""
    ranks = start(tmp_path, fault=Fault(1, "step", str(EVERY + 2), signal.SIGSTOP))
    _wait_until_stopped(ranks[1].pid)
    time.sleep(SECONDS / 4)
    os.kill(ranks[1].pid, signal.SIGCONT)
    assert finish(ranks) == [0] * RANKS, logs(tmp_path)
    assert (tmp_path / "trained.safetensors").read_bytes() == undisturbed


def test_rank_that_never_answers(tmp_path: Path, undisturbed: bytes) -> None:
    """Stopped for good: the other ends within the process group's timeout."""
    ranks = start(tmp_path, fault=Fault(1, "step", str(EVERY + 2), signal.SIGSTOP))
    _wait_until_stopped(ranks[1].pid)
    began = time.monotonic()
    assert finish(ranks[:1], seconds=SECONDS + 10) == [1]
    assert time.monotonic() - began >= SECONDS / 2
    assert "Timed out" in (tmp_path / "rank0.log").read_text()
    ranks[1].kill()
    ranks[1].join()
    _goes_on(tmp_path, undisturbed, step=EVERY)


def _wait_until_stopped(pid: int) -> None:
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
        assert time.monotonic() < deadline, "it never stopped"
        time.sleep(0.05)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint of the training and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(small_disk: Path, undisturbed: bytes) -> None:
    """A real file system that fills up in the middle of a file."""
    filler = small_disk / "filler"
    filler.write_bytes(bytes(120_000))
    assert finish(start(small_disk)) == [1] * RANKS
    assert "No space left on device" in logs(small_disk)
    assert "nothing was saved" in logs(small_disk)
    step = find_step(small_disk)
    assert 0 < step < STEPS
    assert not list((small_disk / "run").glob(".*"))
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    _goes_on(small_disk, undisturbed, step=step)


def test_read_only_disk(small_disk: Path, undisturbed: bytes) -> None:
    """A real file system that becomes read-only, as one does after an error of its disk."""
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    run = small_disk / "run"
    assert finish(start(small_disk, fault=Fault(1, "step", str(EVERY + 1)))) == [1, KILLED]
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=4k", "tmpfs", str(run)], check=True)
    try:
        assert finish(start(small_disk)) == [1] * RANKS
        assert "Read-only file system" in logs(small_disk)
    finally:
        subprocess.run(["umount", str(run)], check=True)
    _goes_on(small_disk, undisturbed, step=EVERY)
