"""The launcher itself: what hangs, dies or fails is named with its rank, and the tasks after it still run."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support import launch
from tests.support.engines import Engine
from tests.support.launch import Task, run_tasks


def _passes(engine: Engine) -> None:
    dist.barrier()


def _hangs(engine: Engine) -> None:
    if engine.rank == 1:
        time.sleep(1000)
    dist.barrier()


def _dies(engine: Engine) -> None:
    if engine.rank == 0:
        os._exit(3)
    dist.barrier()


def _fails_on_one_rank(engine: Engine) -> None:
    if engine.rank == 1:
        raise ValueError("seen by rank 1 only")
    time.sleep(1000)


def _is_killed(engine: Engine, until: str = "") -> None:
    if engine.rank == 0 and not Path(until or "/nowhere").exists():
        if until:
            Path(until).touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()


def test_a_rank_that_a_signal_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is launched once more, aloud; what dies again fails, and so does the next one that dies."""
    monkeypatch.setattr(launch, "GRACE", 1.0)
    once = {"until": str(tmp_path / "once")}
    tasks = [
        Task("passes", "ddp", 2, _passes),
        Task("once", "ddp", 2, _is_killed, once),
        Task("after", "ddp", 2, _passes),
        Task("always", "ddp", 2, _is_killed),
        Task("end", "ddp", 2, _passes),
    ]
    with pytest.warns(UserWarning, match="ddp-2-once: a signal ended a rank.*launched once more"):
        results = run_tasks(tasks)
    assert [name for name, error in results.items() if error] == ["ddp-2-always"]
    assert "rank 0 died with exit code -11" in results["ddp-2-always"]
    with pytest.warns(UserWarning, match="ddp-2-always: a signal ended a rank"):
        assert "exit code -11" in run_tasks(tasks[3:4])["ddp-2-always"]


def test_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within its limits: a hang would otherwise hold up everything."""
    monkeypatch.setattr(launch, "TASK_LIMIT", 5.0)
    monkeypatch.setattr(launch, "GRACE", 1.0)
    functions = (_passes, _hangs, _passes, _dies, _passes, _fails_on_one_rank, _passes)
    tasks = [Task(f"{i}", "ddp", 2, function) for i, function in enumerate(functions)]
    began = time.monotonic()
    results = run_tasks(tasks)
    outcomes = [results[task.id] for task in tasks]
    assert time.monotonic() - began < 60
    for index in (0, 2, 4, 6):
        assert outcomes[index] == ""
    assert "rank 1 hangs" in outcomes[1]
    assert "_hangs" in outcomes[1]
    assert "rank 0 died with exit code 3" in outcomes[3]
    assert "seen by rank 1 only" in outcomes[5]
    assert "rank 0 hangs" in outcomes[5]
