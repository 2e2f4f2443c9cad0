"""The launcher itself: what hangs, dies or fails is named with its rank, and the tasks after it still run."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
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


def _is_killed(engine: Engine) -> None:
    if engine.rank == 0:
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()


def _fails_where_the_other_reduces(engine: Engine) -> None:
    if engine.rank == 1:
        raise ValueError("seen by rank 1 only")
    dist.all_reduce(torch.zeros(3))


def _reduces_more(engine: Engine) -> None:
    dist.all_reduce(torch.zeros(100))


def test_a_rank_that_failed_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the next task it would meet ranks that are still in its own: gloo ends those by a signal."""
    monkeypatch.setattr(launch, "GRACE", 1.0)
    tasks = [
        Task("fails", "ddp", 2, _fails_where_the_other_reduces),
        Task("reduces", "ddp", 2, _reduces_more),
    ]
    failed, reduced = run_tasks(tasks).values()
    assert "rank 0 hangs" in failed
    assert "seen by rank 1 only" in failed
    assert not reduced


def test_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within its limits: a hang would otherwise hold up everything."""
    monkeypatch.setattr(launch, "TASK_LIMIT", 5.0)
    monkeypatch.setattr(launch, "GRACE", 1.0)
    functions = (_passes, _hangs, _passes, _dies, _passes, _fails_on_one_rank, _passes, _is_killed, _passes)
    tasks = [Task(f"{i}", "ddp", 2, function) for i, function in enumerate(functions)]
    began = time.monotonic()
    results = run_tasks(tasks)
    outcomes = [results[task.id] for task in tasks]
    assert time.monotonic() - began < 60
    for index in (0, 2, 4, 6, 8):
        assert outcomes[index] == ""
    assert "rank 1 hangs" in outcomes[1]
    assert "_hangs" in outcomes[1]
    assert "rank 0 died with exit code 3" in outcomes[3]
    assert "seen by rank 1 only" in outcomes[5]
    assert "rank 0 hangs" in outcomes[5]
    assert "rank 0 died with exit code -11" in outcomes[7]
