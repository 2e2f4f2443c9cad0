"""A job that was stopped or killed goes on where it was, and ends as one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sharded_spd.finetune.report.history import read_history
from tests.job.commands import COMMAND, SECONDS, environment, finetune, metrics
from tests.job.test_stopping import processes_of, wait_for

SETTINGS = ("engine=fsdp2", "ranks=2", "train.epochs=30", "train.evaluations=4", "checkpointing.every=7")


def run(job: Path, home: Path, name: str, *more: str) -> subprocess.CompletedProcess[str]:
    return finetune(str(job), *SETTINGS, f"output_dir={home / name}", *more, cache=home)


def disturb(job: Path, home: Path, name: str, at: int, how: Callable[[subprocess.Popen[bytes]], None]) -> int:
    """Start the job, do `how` to it once it has logged `at` steps, and return its exit code."""
    with open(home / f"{name}.txt", "w") as output:
        process = subprocess.Popen(
            [*COMMAND, str(job), *SETTINGS, f"output_dir={home / name}"],
            cwd=home,
            env=environment(home),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    path = home / name / "metrics.jsonl"

    def far_enough() -> bool:
        assert process.poll() is None, (home / f"{name}.txt").read_text()
        return path.exists() and len(metrics(home / name, "step")) >= at

    wait_for(far_enough)
    how(process)
    code = process.wait(timeout=SECONDS)
    assert not processes_of(home / name)
    return code


@pytest.fixture(scope="module")
def undisturbed(tiny_job: Path, home: Path) -> dict[str, object]:
    done = run(tiny_job, home, "undisturbed")
    assert done.returncode == 0, done.stderr
    return outcome(home / "undisturbed")


def outcome(directory: Path) -> dict[str, object]:
    """The weights of both methods, every score of the tests, and each step's loss, each step once."""
    models = {
        method: (directory / "checkpoints" / f"{method}-seed0" / "model.safetensors").read_bytes()
        for method in ("adamw", "spd")
    }
    evaluated = {(e["method"], e["step"]): e["scores"] for e in metrics(directory, "evaluation")}
    assert len(evaluated) == 8
    losses = [(e["method"], e["step"], e["loss"]) for e in metrics(directory, "step")]
    assert [step for _, step, _ in losses] == [*range(1, 61)] * 2
    moved = [(e["method"], e["step"], e["layers"]) for e in metrics(directory, "layers")]
    assert read_history(directory).damaged == 0
    assert "broken off" not in (directory / "report.html").read_text()
    return {**models, "scores": evaluated, "losses": losses, "moved": moved}


def kill_a_rank(process: subprocess.Popen[bytes]) -> None:
    directory = next(a for a in process.args if str(a).startswith("output_dir="))  # type: ignore[union-attr]
    found = processes_of(Path(str(directory).removeprefix("output_dir=")))
    os.kill(max(pid for pid, kind in found.items() if kind == "rank"), signal.SIGKILL)


@pytest.mark.parametrize(
    ("name", "how", "code", "at"),
    [
        ("stopped", lambda process: process.terminate(), 143, 75),
        pytest.param("rank-killed", kill_a_rank, 137, 40, marks=pytest.mark.slow),
        pytest.param("killed", lambda process: process.kill(), -9, 75, marks=pytest.mark.slow),
    ],
)
def test_goes_on_bit_for_bit(
    name: str,
    how: Callable[[subprocess.Popen[bytes]], None],
    code: int,
    at: int,
    tiny_job: Path,
    home: Path,
    undisturbed: dict[str, object],
) -> None:
    """In the second training (the first is done) or in the first one."""
    assert disturb(tiny_job, home, name, at, how) == code
    said = (home / f"{name}.txt").read_text()
    if code == 143:
        assert f"--resume {home / name} goes on" in " ".join(said.split())
    if code == 137:
        assert "cannot continue: another rank has ended" in said
        assert "rank 1 was ended by SIGKILL" in said
    again = run(tiny_job, home, name, "--resume", "auto")
    assert again.returncode == 0, again.stderr
    assert "Going on in" in again.stdout
    assert len(metrics(home / name, "resumed")) == 1
    assert outcome(home / name) == undisturbed
    assert not (home / name / "training").exists()
    assert json.loads((home / name / "progress.json").read_text())["finished"]


@pytest.mark.slow
def test_goes_on_elsewhere(tiny_job: Path, home: Path) -> None:
    """Two ranks of FSDP2, then one process; a run of another job is refused by name, or left alone."""
    disturb(tiny_job, home, "moved", 40, lambda process: process.terminate())
    other = run(tiny_job, home, "moved", "--resume", "auto", "train.lr=0.5")
    assert other.returncode == 0, other.stderr
    assert not metrics(home / "moved-2", "resumed"), "another job went on in this one's run"
    wrong = run(tiny_job, home, "moved", "--resume", str(home / "moved"), "train.lr=0.5")
    assert wrong.returncode == 2
    assert "it differs in train" in wrong.stderr
    moved = run(tiny_job, home, "moved", "--resume", "auto", "engine=single", "ranks=1")
    assert moved.returncode == 0, moved.stderr
    assert metrics(home / "moved", "resumed")
    nothing = run(tiny_job, home, "moved", "--resume", str(home / "none"))
    assert nothing.returncode == 2
    assert "is no run" in nothing.stderr
