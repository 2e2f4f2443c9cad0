"""Signals and dying ranks: what was trained is saved, and no process is left behind."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForImageClassification

from tests.job.commands import COMMAND, SECONDS, environment, metrics


def processes_of(run: Path) -> dict[int, str]:
    """The live processes whose command line or environment names this run, by id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                rank = (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:  # gone meanwhile, or another user's
                continue
            if f"output_dir={run} " in command and state != "Z":
                found[int(entry.name)] = "rank" if b"SHARDED_SPD_RENDEZVOUS=" in rank else "command"
    return found


def wait_for(condition: Callable[[], bool], *, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


class LongRun:
    """A job that would take minutes, after its first steps."""

    def __init__(self, job: Path, home: Path, name: str) -> None:
        self.directory = home / name
        arguments = ["engine=fsdp2", "ranks=2", "train.epochs=5000", f"output_dir={self.directory}"]
        with open(home / f"{name}.txt", "w") as output:
            self.process = subprocess.Popen(
                [*COMMAND, str(job), *arguments, "save=all"],
                cwd=home,
                env=environment(home),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.output = home / f"{name}.txt"
        wait_for(self.training)

    def training(self) -> bool:
        if self.process.poll() is not None:
            pytest.fail(f"ended early:\n{self.output.read_text()}")
        return (self.directory / "metrics.jsonl").exists() and len(metrics(self.directory, "step")) > 3

    def ranks(self) -> list[int]:
        return [pid for pid, kind in processes_of(self.directory).items() if kind == "rank"]


@pytest.fixture
def long_run(tiny_job: Path, home: Path, request: pytest.FixtureRequest) -> Iterator[LongRun]:
    run = LongRun(tiny_job, home, request.node.name)
    yield run
    for pid in processes_of(run.directory):  # only where the test has failed
        os.kill(pid, signal.SIGKILL)
    run.process.wait()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_ends_all_ranks(long_run: LongRun, number: signal.Signals, code: int) -> None:
    assert len(long_run.ranks()) == 2
    long_run.process.send_signal(number)
    assert long_run.process.wait(timeout=SECONDS) == code
    assert processes_of(long_run.directory) == {}
    text = " ".join(long_run.output.read_text().split())
    saved = long_run.directory / "checkpoints" / "interrupted"
    assert "Stopped" in text
    assert f"the unfinished model at {saved}" in text
    assert "Traceback" not in text
    AutoModelForImageClassification.from_pretrained(saved)
    assert metrics(long_run.directory, "end")


def test_ranks_die_with_a_killed_command(long_run: LongRun) -> None:
    long_run.process.kill()
    long_run.process.wait()
    wait_for(lambda: not processes_of(long_run.directory), seconds=20)


def test_a_killed_rank_ends_the_job(long_run: LongRun) -> None:
    os.kill(max(long_run.ranks()), signal.SIGKILL)
    assert long_run.process.wait(timeout=60) not in (0, None)
    assert processes_of(long_run.directory) == {}
