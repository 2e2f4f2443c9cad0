"""Runs the command as a user does, in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests.support.warm import python

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "sharded_spd", "finetune"]
NOTHING: Mapping[str, str] = MappingProxyType({})
SECONDS = 240
"""A run takes 5 to 15 s; a hang must fail before the test's own limit."""


def environment(cache: Path) -> dict[str, str]:
    """No rank of another launcher, no thread settings, and a cache of this test session."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SHARDED_SPD_RENDEZVOUS", "SHARDED_SPD_SUPERVISOR")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    own = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache), "COLUMNS": "100", "PYTHON": sys.executable}
    return {**kept, **own}


def finetune(
    *arguments: str,
    cache: Path,
    command: list[str] = COMMAND,
    extra: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.CompletedProcess[str]:
    """Run to the end, with `extra` in the environment; where that is nothing, without the time of imports."""
    warm = command is COMMAND and not extra
    return subprocess.run(
        [python("job") if warm else command[0], *command[1:], *arguments],
        cwd=cache,
        env={**environment(cache), **extra},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def finished(
    *arguments: str,
    cache: Path,
    command: list[str] = COMMAND,
    extra: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Run to the end, which must be a good one, and return what it printed."""
    done = finetune(*arguments, cache=cache, command=command, extra=extra)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def metrics(run: Path, event: str) -> list[dict[str, Any]]:
    """The lines of a kind in a run's metrics."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def results(run: Path) -> dict[str, Any]:
    """The results of a run."""
    return json.loads((run / "results.json").read_text())
