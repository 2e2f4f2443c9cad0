"""How much code a step runs through; runs on every rank of a launch."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from tests.reference.oracle import LayerOptions
from tests.support.engines import Engine
from tests.support.step_path import StepPath
from tests.support.training import Training

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"


def few_modules(engine: Engine, *, modules: int, moves: int) -> None:
    """A step of AdamSPD on four layers enters those of the page, once the first ones have been checked."""
    torch.manual_seed(0)
    start = {f"{name}.{kind}": torch.randn(8) for name in "ab" for kind in ("weight", "bias")}
    training = Training(engine, start, LayerOptions(lr=0.01, weight_decay=1.0))
    for _ in range(4):
        training.step({name: torch.randn_like(w) for name, w in start.items()})
    training.backward({name: torch.randn_like(w) for name, w in start.items()})
    path = StepPath()
    path.trace(training.optimizer.step)
    assert len(path.calls) <= modules, path
    assert path.moves <= moves, path
    page = PAGE.read_text(encoding="utf-8").partition("### To follow one step")[2].partition("###")[0]
    assert set(path.calls) == set(re.findall(r"^\d+\. \[([\w/]+\.py)\]", page, re.M)), path
