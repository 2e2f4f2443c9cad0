"""What one rank alone runs into in the middle of a run: all ranks raise, none waits, and training goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.contract import one_rank_course_cases as cases
from tests.support.launch import Task
from tests.support.training import FORMS

SPLIT = (("fsdp2", 2), ("fsdp2", 4), ("fsdp2_tp", 4), ("fsdp1", 2))
QUICK = (("fsdp2", 2), ("fsdp2_ep", 4), ("zero", 2), ("ddp", 2))
SUB = {"sub_group_size": 20}


def _task(cell: tuple[str, int], function: Callable[..., None], label: str, **options: Any) -> Task:
    return Task(f"{function.__name__}-{label}", *cell, function, options, slow=cell not in QUICK)


def _all() -> Iterator[Task]:
    for turn, cell in enumerate((*SPLIT, ("fsdp1_flat", 2), ("tp", 2), ("ddp", 2))):
        for i, (key, value) in enumerate((("weight_decay", -1.0), ("max_pull", -2.0))):
            rank = (turn + i) % cell[1]
            yield _task(cell, cases.setting_put_right, key, key=key, value=value, rank=rank)
    for turn, cell in enumerate(SPLIT):
        for i, call in enumerate(("step", "state_dict", "deviation", "bind")):
            yield _task(cell, cases.base_raises_then, call, call=call, rank=(turn + i) % 2)
        for i, form in enumerate(FORMS):
            yield _task(cell, cases.bound_while_others_step, form, form=form, rank=(turn + i) % 2)
    for turn, cell in enumerate((*SPLIT[:2], ("hsdp", 4), ("fsdp1", 2))):
        yield _task(cell, cases.group_refused, "1", rank=turn % 2)
    for cell in (*SPLIT[:1], ("fsdp1", 2), ("ddp", 2)):
        yield _task(cell, cases.files, "1", rank=1)
    for i, form in enumerate(FORMS):
        yield _task(("fsdp2_ep", 4), cases.scopes_in_another_order, form, form=form, rank=3 * i)
    for stage in (1, 2, 3):
        for i, source in enumerate(("lambda", *cases.BREAKS)):
            own = {"stage": stage, "source": source, "rank": (stage + i) % 2}
            zero = SUB if source == "before" and stage == 3 else {}
            yield _task(("zero", 2), cases.step_of_zero, f"{stage}-{source}", **own, zero=zero)


@pytest.mark.parametrize("task", [pytest.param(task, id=task.id, marks=task.marks) for task in _all()])
def test_one_rank_course(task: Task, distributed: Callable[[Task], None]) -> None:
    """What the case's function says."""
    distributed(task)
