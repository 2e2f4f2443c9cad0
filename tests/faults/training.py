"""A real training on real ranks that a test disturbs; it goes on from its last complete checkpoint."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sharded_spd import SPDConfig, attach
from sharded_spd.checkpoint import Checkpoints
from tests.support.launch import server

STEPS, EVERY, RANKS, SECONDS = 12, 3, 2, 8.0
"""Steps of a training, steps between checkpoints, ranks, and how long a rank waits for another."""


@dataclass(frozen=True)
class Fault:
    """What happens to `rank`, once.

    `when`: "step" (at `place` = the step's number, between backward and the optimizer's step), "bytes" (at
    that size of a file that it writes), or the name of an audit event of Python whose first argument matches
    `place`. `what`: SIGKILL, SIGSTOP, or an error number that the call then fails with.
    """

    rank: int
    when: str
    place: str
    what: signal.Signals | int = signal.SIGKILL
    count: int = 1


def start(folder: Path, *, fault: Fault | None = None, asynchronous: bool = False) -> list[Any]:
    """The ranks of the training in `folder`, running; it goes on from what an earlier one has left there."""
    meeting = folder / f"rendezvous-{time.monotonic_ns()}"
    ranks = [
        server().Process(target=_rank_main, args=(rank, folder, meeting, fault, asynchronous), daemon=True)
        for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    return ranks


def finish(ranks: list[Any], *, seconds: float = 60.0) -> list[int]:
    """The exit codes; ranks that are still there after that time are an error."""
    deadline = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
        process.join()
    assert not late, f"ranks {late} were still there after {seconds} s"
    return [process.exitcode for process in ranks]


def logs(folder: Path) -> str:
    """What the ranks of the last training said."""
    return "\n".join((folder / f"rank{rank}.log").read_text() for rank in range(RANKS))


def _rank_main(rank: int, folder: Path, meeting: Path, fault: Fault | None, asynchronous: bool) -> None:
    log = open(folder / f"rank{rank}.log", "w", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    try:
        store = f"file://{meeting}"
        limit = timedelta(seconds=SECONDS)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=limit)
        _train(rank, folder, fault if fault is not None and fault.rank == rank else None, asynchronous)
    except BaseException:
        traceback.print_exc()
        log.flush()
        os._exit(1)
    os._exit(0)


def _train(rank: int, folder: Path, fault: Fault | None, asynchronous: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 7))
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0)
    projector = attach(optimizer, model, SPDConfig(weight_decay=2.0))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    checkpoints = Checkpoints(folder / "run", keep_last=2, asynchronous=asynchronous)
    torch.manual_seed(rank + 1)
    found = checkpoints.load(model, optimizer, projector=projector, scheduler=schedule)
    begin = 0 if found is None else found.step
    assert found is None or found.extra == {"seen": begin}
    print(f"begins after step {begin}", flush=True)
    if fault is not None and fault.when not in ("step", "bytes"):
        _arm(fault)
    for step in range(begin + 1, STEPS + 1):
        if fault is not None and fault.when == "bytes" and step == EVERY + 1:
            _arm(fault)
        model(torch.randn(16, 48)).square().mean().backward()
        if fault is not None and (fault.when, fault.place) == ("step", str(step)):
            os.kill(os.getpid(), fault.what)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % EVERY == 0:
            checkpoints.save(
                step, model, optimizer, projector=projector, scheduler=schedule, extra={"seen": step}
            )
    checkpoints.wait()
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        save_file(whole, folder / "trained.safetensors")


def _arm(fault: Fault) -> None:
    if fault.when == "bytes":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which Python ignores: the kernel ends the process
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault.place), resource.RLIM_INFINITY))
        return
    pattern, left = re.compile(fault.place), fault.count

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event != fault.when or not pattern.search(str(arguments[0])):
            return
        left -= 1
        if left == 0:
            sys.stderr.flush()
            if isinstance(fault.what, signal.Signals):
                os.kill(os.getpid(), fault.what)
            else:
                raise OSError(fault.what, os.strerror(fault.what), str(arguments[0]))

    sys.addaudithook(hook)
