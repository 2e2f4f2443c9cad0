"""Fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.support.launch import Task, run_tasks

TASKS = pytest.StashKey[list[Task]]()
OUTCOMES = pytest.StashKey[dict[str, str]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Notes the distributed tasks that were selected, so that one launch runs all of its own."""
    params = (getattr(item, "callspec", None) for item in session.items)
    session.config.stash[TASKS] = [
        value for spec in params if spec for value in spec.params.values() if isinstance(value, Task)
    ]
    session.config.stash[OUTCOMES] = {}


@pytest.fixture
def distributed(request: pytest.FixtureRequest) -> Callable[[Task], None]:
    """Runs a task on its ranks, with all the selected tasks of its launch, and fails if any rank failed."""

    def check(task: Task) -> None:
        stash = request.config.stash
        outcomes = stash[OUTCOMES]
        if task.id not in outcomes:
            outcomes.update(run_tasks([other for other in stash[TASKS] if other.launch == task.launch]))
        if outcomes[task.id]:
            pytest.fail(f"{task.id} failed:\n{outcomes[task.id]}", pytrace=False)

    return check


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
