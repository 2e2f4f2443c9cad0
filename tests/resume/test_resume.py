"""Checkpoints of real runs, on the same and on other ranks and engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.resume import cases, export_cases, zero_cases
from tests.support.launch import Task
from tests.support.training import FORMS
from tests.support.zero import Setting

CELLS = (
    ("single", 1),
    ("ddp", 2),
    ("fsdp2", 2),
    ("fsdp2", 4),
    ("hsdp", 4),
    ("fsdp2_tp", 4),
    ("fsdp1", 2),
    ("fsdp1_flat", 2),
)

RARER = (("fsdp2_ep", 4), ("fsdp2_odd", 3), ("fsdp2_offload", 2), ("hsdp_tp", 8))


def _all() -> Iterator[Task]:
    for turn, cell in enumerate(RARER):
        asynchronous, form = bool(turn % 2), FORMS[turn % 2]
        options = {"form": form, "asynchronous": asynchronous}
        yield Task(f"same_ranks-{form}", *cell, cases.same_ranks, options, slow=True)
    for turn, cell in enumerate(CELLS):
        for asynchronous in (False, True):
            form = FORMS[(turn + asynchronous) % 2]
            name = f"same_ranks-{form}{'-async' if asynchronous else ''}"
            yield Task(name, *cell, cases.same_ranks, {"form": form, "asynchronous": asynchronous})
    yield Task("other_ranks_and_engines", "fsdp2", 4, cases.other_ranks_and_engines)
    for stage in (1, 2, 3):
        for dtype in ("fp32", "bf16"):
            setting = {"setting": Setting(stage=stage, dtype=dtype)}
            slow = (stage, dtype) not in ((1, "bf16"), (3, "fp32"))
            yield Task(f"same_ranks-{stage}-{dtype}", "zero", 2, zero_cases.same_ranks, setting, slow=slow)
    for cell in CELLS:
        yield Task("exported", *cell, export_cases.exported)
    for stage, dtype in ((1, "bf16"), (3, "fp32"), (3, "bf16")):
        setting = {"setting": Setting(stage=stage, dtype=dtype)}
        yield Task(f"exported-{stage}-{dtype}", "zero", 2, export_cases.exported_zero, setting)
    for cell in (("fsdp2", 2), ("fsdp1", 2), ("ddp", 2)):
        yield Task("refusals", *cell, cases.refusals)
        for asynchronous in (False, True):
            name = f"one_rank_cannot_write{'-async' if asynchronous else ''}"
            yield Task(name, *cell, cases.one_rank_cannot_write, {"asynchronous": asynchronous})


@pytest.mark.parametrize("task", [pytest.param(task, id=task.id, marks=task.marks) for task in _all()])
def test_resume(task: Task, distributed: Callable[[Task], None]) -> None:
    """What the case's function says."""
    distributed(task)
