"""Every rank-local source of trouble, on one rank only, in every public call: all ranks raise, none waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.contract import one_rank_cases as cases
from tests.support.launch import Task
from tests.support.training import FORMS

SHARDED = (("fsdp2", 2), ("fsdp2", 4), ("hsdp", 4), ("fsdp2_tp", 4), ("fsdp1", 2), ("tp", 2))
FLAT = (("fsdp1_flat", 2),)
WHOLE = (("ddp", 2),)
SHARED_OUT = (("zero_redundancy", 2), ("oss", 2))
Cell = tuple[str, int]


def _task(cell: Cell, function: Callable[..., None], who: int, **options: Any) -> Task:
    label = "-".join(str(value) for key, value in options.items() if key != "told")
    return Task(f"{function.__name__}-{label}-on{who}", *cell, function, {**options, "who": who})


def _turns(cell: Cell) -> Iterator[int]:
    """Which rank fails, in turn."""
    turn = 0
    while True:
        yield (cell[1] - 1, 0, 1)[turn % 3]
        turn += 1


def _making(cell: Cell) -> Iterator[Task]:
    who = _turns(cell)
    for trouble in cases.MAKING:
        for form in FORMS:
            if form == "adam_spd" or trouble not in cases.NOT_ATTACHED:
                yield _task(cell, cases.making, next(who), trouble=trouble, form=form)
    for trouble in ("pattern", "config", "target", "attached", "telemetry"):
        yield _task(cell, cases.attaching, next(who), trouble=trouble)


def _differing(cell: Cell) -> Iterator[Task]:
    who = _turns(cell)
    for number, setting in enumerate(cases.DIFFER):
        yield _task(cell, cases.settings_differ, next(who), setting=setting, form=FORMS[number % 2])
    for form in FORMS:
        yield _task(cell, cases.order_differs, next(who), form=form)
    yield _task(cell, cases.deferral_differs, next(who))


def _bound(cell: Cell) -> Iterator[Task]:
    who = _turns(cell)
    for form in FORMS:
        for trouble in ("prepare", "model"):
            yield _task(cell, cases.binding, next(who), trouble=trouble, form=form)
        for trouble in ("fingerprint", "num_steps", "layers"):
            yield _task(cell, cases.loading, next(who), trouble=trouble, form=form)
    for trouble in cases.GROUPS:
        yield _task(cell, cases.adding_a_group, next(who), trouble=trouble)
    for trouble in ("fingerprint", "groups", "keys"):
        yield _task(cell, cases.loading_an_optimizer, next(who), trouble=trouble)
    yield _task(cell, cases.measuring, next(who))
    for trouble in ("step", "extra", "load", "export_names"):
        yield _task(cell, cases.saving, next(who), trouble=trouble)
    yield _task(cell, cases.parameters_that_raise, next(who))


def _stepping(cell: Cell, *, told: bool) -> Iterator[Task]:
    who = _turns(cell)
    for form in FORMS:
        for trouble in ("lambda", "max_pull", "lr", "group", "sparse", "swapped"):
            if form == "attached" and trouble in ("lambda", "max_pull"):
                continue  # they stand in the configuration
            if trouble == "sparse" and cell[0] in ("fsdp2", "hsdp", "fsdp2_tp", "tp"):
                continue  # a DTensor's gradient is none
            yield _task(cell, cases.in_a_step, next(who), trouble=trouble, form=form, told=told)
        yield _task(cell, cases.in_a_closure, next(who), form=form, told=told)
    for trouble in cases.RULES:
        yield _task(cell, cases.in_a_rule, next(who), trouble=trouble, told=told)
    yield _task(cell, cases.in_a_store, next(who), told=told)
    if told:
        for then in ("update", "state_dict", "deviation", "bind"):
            yield _task(cell, cases.in_the_base, next(who), then=then)
        yield _task(cell, cases.one_calls_while_others_step, next(who), call="bind")


def _all() -> Iterator[Task]:
    for cell in (*SHARDED, *FLAT):
        yield from _making(cell)
        yield from _differing(cell)
        yield from _bound(cell)
        yield from _stepping(cell, told=True)
    for cell in WHOLE:
        yield from _making(cell)
        yield from _bound(cell)
    for cell in (*WHOLE, *SHARED_OUT):
        yield from _stepping(cell, told=False)
    for cell in SHARED_OUT:
        yield from _making(cell)
    for form in FORMS:
        yield _task(("fsdp2_ep", 4), cases.order_differs, 1, form=form)
    for stage in (1, 2, 3):
        for turn, trouble in enumerate(("lambda", "lr", "statistic", "early_statistic")):
            yield _task(("zero", 2), cases.in_a_step_of_zero, turn % 2, stage=stage, trouble=trouble)
    yield _task(("zero", 2), cases.in_a_step_of_zero, 1, stage=3, trouble="statistic", sub=True)


@pytest.mark.parametrize("task", [pytest.param(task, id=task.id, marks=task.marks) for task in _all()])
def test_one_rank(task: Task, distributed: Callable[[Task], None]) -> None:
    """What the case's function says."""
    distributed(task)
