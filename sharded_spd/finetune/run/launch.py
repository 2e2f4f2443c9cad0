"""Starting the ranks of a job on this machine, and ending every one of them whatever happens."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from sharded_spd.finetune.world import RENDEZVOUS

SUPERVISOR = "SHARDED_SPD_SUPERVISOR"
"""Environment variable: the process id of the command that started this rank."""

STOP_SECONDS = 60.0
"""How long the ranks may take to save and leave after a signal."""

FAIL_SECONDS = 5.0
"""How long the other ranks may live on when one has failed: they may report the same error, or hang."""


def follow_supervisor() -> None:
    """Make this rank die with the command that started it, even if that one is killed (Linux)."""
    parent = os.environ.get(SUPERVISOR)
    if parent is None or not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the line above
        os._exit(1)


class _Ranks:
    """The processes of one job, watched by this one."""

    def __init__(self, arguments: Sequence[str], *, ranks: int, folder: Path) -> None:
        threads = max(1, (os.cpu_count() or 1) // ranks)
        self.logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.received: signal.Signals | None = None
        for rank in range(ranks):
            environment = {
                "OMP_NUM_THREADS": str(threads),
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                RENDEZVOUS: str(folder / "rendezvous"),
                SUPERVISOR: str(os.getpid()),
            }
            with open(self.logs[rank], "wb") as log:
                # Rank 0 has the terminal. Sessions of their own: Ctrl-C reaches only this process, which
                # passes it on.
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "sharded_spd", *arguments],
                        env=environment,
                        start_new_session=True,
                        stdin=subprocess.DEVNULL,
                        stdout=None if rank == 0 else log,
                        stderr=None if rank == 0 else subprocess.STDOUT,
                    )
                )

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Ask every rank to stop, by SIGTERM: one that is still importing then ends without a traceback."""
        self.received = signal.Signals(number)
        for process in self.processes:
            if process.poll() is None:
                process.terminate()

    def wait(self) -> int:
        """Wait for all; the exit code of the first one to fail, 0 if none did."""
        code, culprit, deadline = 0, 0, float("inf")
        while any(process.poll() is None for process in self.processes):
            for rank, process in enumerate(self.processes):
                if process.poll() and not code:
                    code, culprit, deadline = process.returncode, rank, time.monotonic() + FAIL_SECONDS
            if self.received is not None and deadline == float("inf"):
                deadline = time.monotonic() + STOP_SECONDS
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        self.kill()
        failed = [rank for rank, process in enumerate(self.processes) if process.returncode]
        if self.received is not None:
            if self.processes[0].returncode < 0:  # it had no time to say so itself
                print("Stopped before anything was saved.", file=sys.stderr)
            return 128 + self.received
        if code < 0:  # it could not say so itself
            print(f"rank {culprit} was ended by {signal.Signals(-code).name}", file=sys.stderr)
        if failed and not code:
            culprit, code = failed[0], self.processes[failed[0]].returncode
        if code and culprit != 0 and self.processes[0].returncode in (0, -signal.SIGKILL):
            text = self.logs[culprit].read_text(errors="replace").strip()
            print(f"rank {culprit} ended with exit code {code}:\n{text[-4000:]}", file=sys.stderr)
        return code if code >= 0 else 128 - code

    def kill(self) -> None:
        """End what still runs, with everything that it started."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()


def supervise(arguments: Sequence[str], *, ranks: int) -> int:
    """Run `python -m sharded_spd ARGUMENTS` as `ranks` ranks on this machine and return the job's exit code.

    SIGINT and SIGTERM are passed on, so that the ranks save and leave; what is still there after a minute is
    killed. The exit code is then 130 or 143. If one rank fails, the others are ended.
    """
    with tempfile.TemporaryDirectory(prefix="sharded_spd_") as folder:
        ranked: _Ranks | None = None
        early: list[int] = []

        def receive(number: int, frame: FrameType | None) -> None:
            if ranked is None:
                early.append(number)
            else:
                ranked.receive(number, frame)

        before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            ranked = _Ranks(arguments, ranks=ranks, folder=Path(folder))
            if early:
                ranked.receive(early[0], None)
            return ranked.wait()
        finally:
            if ranked is not None:
                ranked.kill()
            for number, handler in before.items():
                signal.signal(number, handler)
