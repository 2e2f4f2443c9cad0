"""Fixtures that all tests share."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.support.launch import Task, run_tasks

TASKS = pytest.StashKey[list[Task]]()
OUTCOMES = pytest.StashKey[dict[str, str]]()


RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_EXIT = os._exit


def pytest_configure() -> None:
    """A test that ends this process would end all tests after it, and nobody would see."""
    here = os.getpid()

    def refuse(code: int) -> None:
        if os.getpid() == here:
            raise RuntimeError(f"os._exit({code}) in the process of the tests")
        _EXIT(code)

    os._exit = refuse  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def _no_rank(request: pytest.FixtureRequest) -> Iterator[None]:
    """What makes a process a rank is taken out of the environment again."""
    before = {name: os.environ.get(name) for name in RANKS}
    yield
    for name, value in before.items():
        if os.environ.get(name) != value:
            warnings.warn(f"{request.node.nodeid} left {name}={os.environ[name]}", stacklevel=1)
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under xdist a file's tests share one worker, and so its fixtures; a launch's tasks have their own."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


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
