"""Nothing on a path that ends in a collective may depend on what one rank alone knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.contract.one_rank_cases import CALLS, NAMED, trouble
from tests.support.launch import Task

SPLIT = (("fsdp2", 2), ("fsdp2", 4), ("fsdp2_tp", 4), ("hsdp", 4), ("fsdp1", 2), ("fsdp1_flat", 2), ("tp", 2))
WHOLE = (("ddp", 2), ("zero_redundancy", 2), ("oss", 2))
"""Engines whose ranks share no layer: a step of theirs has no reduction, and settings are not compared."""

NO_ADDING = (("fsdp1_flat", 2), ("tp", 2), ("fsdp2_tp", 4))
"""One parameter; gradients that torch redistributes in a step, which a rank that binds does not answer."""


def _all() -> Iterator[Task]:
    for turn, cell in enumerate((*SPLIT, *WHOLE)):
        for call, sources in CALLS.items():
            if cell in WHOLE and call.endswith("different"):
                continue
            if call == "add" and cell in NO_ADDING:
                continue
            for i, source in enumerate(sources):
                if (cell in WHOLE[1:] and source in NAMED) or (cell in WHOLE[1:] and call == "add"):
                    continue
                if "tp" in cell[0] and source == "group_of_one_rank":
                    continue  # torch's own Adam gathers gradients there, of layers that one rank alone steps
                own = {"call": call, "source": source, "rank": -((i + turn) % 2)}
                # Every source on one engine, and every engine with a part of the sources, another of each.
                slow = turn > 0 and (i + turn) % 24 > 0
                yield Task(f"{call}-{source}", *cell, trouble, own, slow)


@pytest.mark.parametrize("task", [pytest.param(task, id=task.id, marks=task.marks) for task in _all()])
def test_one_rank(task: Task, distributed: Callable[[Task], None]) -> None:
    """Every rank raises within seconds, and none is out of step afterwards."""
    distributed(task)
