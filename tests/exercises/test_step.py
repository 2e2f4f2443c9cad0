"""Following a step: docs/architecture.svg draws the path that a step takes."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import sharded_spd
from sharded_spd import AdamSPD
from tests.support.engines import Engine
from tests.support.launch import Task
from tests.support.local import gradients, layers
from tests.support.models import Probe

PACKAGE = Path(sharded_spd.__file__).parent
SCRIPT = Path(__file__).parents[2] / "docs" / "draw_architecture.py"


def takes_the_path(engine: Engine) -> None:
    """A step of AdamSPD enters the folders, at the functions, in the order of the picture."""
    model = engine.wrap(Probe(layers()))
    optimizer = AdamSPD(model.named_parameters(), lr=0.02, weight_decay=1.0, fused=False)
    entered: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            entered.append((path.relative_to(PACKAGE).parts[0], frame.f_code.co_name))

    for grads in gradients(2):  # what is made once is not part of the path
        optimizer.zero_grad()
        model(grads).backward()
        entered.clear()
        sys.setprofile(note)
        optimizer.step()
        sys.setprofile(None)
    rest = iter(entered)
    for folder, function, _ in runpy.run_path(str(SCRIPT))["STEP"]:
        assert (folder, function) in rest, f"no {function} in {folder} at its place in {entered}"


TASK = Task("path_of_a_step", "fsdp2", 2, takes_the_path)


@pytest.mark.parametrize("task", [pytest.param(TASK, marks=TASK.marks, id=TASK.id)])
def test_a_step_takes_the_path_of_the_picture(task: Task, distributed: Callable[[Task], None]) -> None:
    distributed(task)
