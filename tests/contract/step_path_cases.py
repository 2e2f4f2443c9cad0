"""How much code a step runs through; runs on every rank of a launch."""

from __future__ import annotations

import torch

from tests.reference.oracle import LayerOptions
from tests.support.engines import Engine
from tests.support.step_path import StepPath
from tests.support.training import Training


def few_modules(engine: Engine, *, modules: int, moves: int) -> None:
    """A step of AdamSPD on four layers, once all is checked that is checked in the first ones."""
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
