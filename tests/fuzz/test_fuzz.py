"""Damaged files of every kind that the package reads."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, Target

CASES = 300
ALL_CASES = 2500
"""Per kind; with eight kinds 20,000."""


def _check(target: Target, cases: int) -> Counter[bool]:
    taken: Counter[bool] = Counter()
    assert target.run(target.valid), "the undamaged file was refused"

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=cases == CASES,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=True))
    def damaged(random: Random) -> None:
        taken[target.run(target.case(random))] += 1

    damaged()
    return taken


@pytest.mark.parametrize(
    "cases", [CASES, pytest.param(ALL_CASES, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files(name: str, cases: int, tmp_path: Path) -> None:
    """Taken, or refused by an error of the package's own; some of both."""
    taken = _check(TARGETS[name](tmp_path), cases)
    assert taken[False] >= cases // 20
    assert taken.total() >= cases // 2


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", TARGETS)
def test_coverage_guided(name: str) -> None:
    """The same by atheris, which looks for content that reaches new code."""
    command = [sys.executable, "-m", "tests.fuzz.atheris_run", name, "-runs=3000", "-max_len=8192"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Done 3000" in done.stderr
