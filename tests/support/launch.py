"""Runs tasks on several ranks: a launch per engine and world size, a limit on each task, all tracebacks.

Ranks are forked from one server that has imported torch already, so that a launch costs a second or two. A
task that fails or hangs ends its launch; the tasks after it run in a fresh one, so that each names itself.

A rank that a signal ends fails its task as one that raises does: nothing is tried a second time.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import multiprocessing as mp
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pytest

TASK_LIMIT = 60.0
GRACE = 5.0
MAX_HANGS = 3
PRELOAD = [
    "pytest",
    "torch",
    "torch.distributed.tensor",
    "torch.distributed.tensor.parallel",
    "torch.distributed.tensor.debug",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.nn.parallel",
    "torch.testing",
    "torch._dynamo",
    "safetensors.torch",
    "tests.support.engines",
    "tests.support.preloaded",
]


@dataclass(frozen=True)
class Task:
    """`function(engine, **options)` on `world` ranks; the function is found by import."""

    name: str
    engine: str
    world: int
    function: Callable[..., None]
    options: dict[str, Any] = field(default_factory=dict)
    slow: bool = False
    patience: float = 1.0
    """How many times the usual limit it may take, where a compiler works."""

    @property
    def launch(self) -> str:
        """Tasks of one launch share it."""
        return f"{self.engine}-{self.world}"

    @property
    def id(self) -> str:
        """The name of the test."""
        return f"{self.launch}-{self.name}"

    @property
    def marks(self) -> list[pytest.MarkDecorator]:
        """One xdist worker runs a launch; the launch has limits of its own."""
        marks = [pytest.mark.xdist_group(self.launch), pytest.mark.timeout(0)]
        return [*marks, pytest.mark.slow] if self.slow else marks


def run_tasks(tasks: Sequence[Task]) -> dict[str, str]:
    """Runs the tasks of one launch; for each its failure, empty where it passed on every rank."""
    outcomes: dict[str, str] = {}
    hangs = 0
    while len(outcomes) < len(tasks):
        rest = [task for task in tasks if task.id not in outcomes]
        if hangs >= MAX_HANGS:
            outcomes.update({task.id: f"not run: {hangs} tasks of this launch hung before" for task in rest})
            break
        with tempfile.TemporaryDirectory(prefix="spd-launch-") as folder:
            done, end = _launch(rest, Path(folder))
        outcomes.update(done)
        hangs += end == "hung"
    return outcomes


End = Literal["done", "failed", "hung"]
"""How a launch ended: in the last two cases with the last of its outcomes."""


def _launch(tasks: Sequence[Task], folder: Path) -> tuple[dict[str, str], End]:
    """Runs tasks until one fails; the outcomes so far, and how it ended."""
    context = server()
    world = tasks[0].world
    ranks = [
        context.Process(target=_rank_main, args=(rank, world, folder, list(tasks)), daemon=True)
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    try:
        return _watch(ranks, tasks, folder)
    finally:
        for process in ranks:
            process.kill()
        for process in ranks:
            process.join()


def _watch(ranks: Sequence[Any], tasks: Sequence[Task], folder: Path) -> tuple[dict[str, str], End]:
    outcomes: dict[str, str] = {}
    for index, task in enumerate(tasks):
        since, failed_at = time.monotonic(), None
        while True:
            # `alive` first: a rank writes its report before it ends
            alive = [process.is_alive() for process in ranks]
            reports = [_report(folder, rank, index) for rank in range(len(ranks))]
            if all(report is not None for report in reports):
                break
            now = time.monotonic()
            dead = any(not alive[rank] and report is None for rank, report in enumerate(reports))
            if failed_at is None and (dead or any(reports)):
                failed_at = now
            if now - since > TASK_LIMIT * task.patience or (
                failed_at is not None and now - failed_at > GRACE
            ):
                end: End = "hung" if failed_at is None else "failed"
                return {**outcomes, task.id: _autopsy(ranks, reports, folder)}, end
            time.sleep(0.02)
        outcomes[task.id] = "\n".join(
            f"--- rank {rank} ---\n{report}" for rank, report in enumerate(reports) if report
        )
        if outcomes[task.id]:  # the ranks may have left each other in different collectives
            return outcomes, "failed"
    return outcomes, "done"


def _report(folder: Path, rank: int, index: int) -> str | None:
    """What that rank said of that task: None nothing yet, empty passed, else its traceback."""
    path = folder / f"{index}.{rank}.json"
    return json.loads(path.read_text())["error"] if path.exists() else None


def _autopsy(ranks: Sequence[Any], reports: Sequence[str | None], folder: Path) -> str:
    """Where each rank is, for a task that did not end on all of them."""
    for process, report in zip(ranks, reports, strict=True):
        if report is None and process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.5)
    parts = []
    for rank, (process, report) in enumerate(zip(ranks, reports, strict=True)):
        if report is None:
            state = "hangs" if process.is_alive() else f"died with exit code {process.exitcode}"
            path = folder / f"rank{rank}.log"
            log = path.read_text(errors="replace")[-4000:] if path.exists() else "it never began"
            parts.append(f"--- rank {rank} {state} ---\n{log}")
        else:
            parts.append(f"--- rank {rank} {'failed' if report else 'passed'} ---\n{report}")
    return "\n".join(parts)


def server() -> Any:
    """The fork server, started on first use with one OpenMP thread per rank."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        mp.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return context


def _rank_main(rank: int, world: int, folder: Path, tasks: Sequence[Task]) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the test run
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable(sys.stderr)
    faulthandler.register(signal.SIGUSR1, sys.stderr)

    import torch
    import torch.distributed as dist

    from tests.support.engines import make_engine

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TASK_LIMIT),
    )
    for index, task in enumerate(tasks):
        torch.manual_seed(0)
        scratch = folder / f"task{index}"
        scratch.mkdir(exist_ok=True)
        error = ""
        try:
            task.function(make_engine(task.engine, scratch), **task.options)
        except BaseException:
            error = traceback.format_exc()
        partial = folder / f"{index}.{rank}.partial"
        partial.write_text(json.dumps({"error": error}))
        partial.rename(folder / f"{index}.{rank}.json")
        if error:
            # In the next task it would meet ranks that are still in this one: gloo ends those by a signal.
            time.sleep(TASK_LIMIT)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's teardown is not what is tested
