"""`attach` around torchao's and bitsandbytes' optimizers, which keep their state in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests.parity import low_bit_cases as cases
from tests.support.launch import Task

TORCHAO = ("torchao.AdamW8bit", "torchao.AdamW4bit", "torchao.AdamWFp8")
BITSANDBYTES = (
    "bitsandbytes.AdamW8bit",
    "bitsandbytes.Adam8bit",
    "bitsandbytes.Lion8bit",
    "bitsandbytes.SGD8bit",
    "bitsandbytes.AdEMAMix8bit",
    "bitsandbytes.PagedAdamW8bit",
    "bitsandbytes.AdamW32bit",
)
EIGHT = (TORCHAO[0], BITSANDBYTES[0])
REFUSED = (
    ("bitsandbytes.AdamW8bit", torch.float32, RuntimeError, "got mixed torch.Tensor and DTensor"),
    (
        "bitsandbytes.AdamW32bit",
        torch.float32,
        NotImplementedError,
        "not have a sharding strategy registered",
    ),
    ("torchao.AdamW8bit", torch.bfloat16, RuntimeError, "expected dtype torch.bfloat16 for `end`"),
)
"""What is no use under FSDP2, with the rule or without.

The operators of bitsandbytes 0.50 do not know DTensor. torchao 0.18 keeps a state of bfloat16
shards whose dtype DTensor mistakes; compiled, the same ends in an error of dynamo's.
"""


def _tasks() -> Iterator[Task]:
    for engine, world in (("single", 1), ("ddp", 2), ("fsdp2", 2)):
        bases = TORCHAO if engine == "fsdp2" else (*TORCHAO, *BITSANDBYTES)
        for base in bases:
            yield _task(engine, world, cases.around, base)
        for base in (b for b in EIGHT if b in bases):
            yield _task(engine, world, cases.around, base, label="file", file=True)
            yield _task(engine, world, cases.scheduled, base)
            yield _task(engine, world, cases.resumed, base)
            if engine != "fsdp2":
                yield _task(engine, world, cases.bfloat16, base)
    for base in TORCHAO:
        yield _task("fsdp2", 2, cases.own_blocks, base)
        for engine, world in (("single", 1), ("fsdp2", 2)):
            yield _task(engine, world, cases.around, base, label="compiled", compiled=True, slow=True)
    for base, dtype, kind, words in REFUSED:
        yield _task("fsdp2", 2, cases.refused, base, dtype=dtype, kind=kind, words=words)


def _task(
    engine: str,
    world: int,
    function: Callable[..., None],
    base: str,
    *,
    label: str = "",
    slow: bool = False,
    **options: Any,
) -> Task:
    name = "-".join(filter(None, (function.__name__, base, label)))
    return Task(name, engine, world, function, {"base": base, **options}, slow, 3.0 if label else 1.0)


def _params() -> Iterator[Any]:
    """The tasks; one whose library is not here is skipped, and kept out of the launches."""
    for task in _tasks():
        library = task.options["base"].partition(".")[0]
        if find_spec(library):
            yield pytest.param(task, id=task.id, marks=task.marks)
        else:
            why = f"{library} is not installed: pip install -e '.[test]'"
            yield pytest.param(None, id=task.id, marks=pytest.mark.skip(reason=why))


@pytest.mark.parametrize("task", list(_params()))
def test_low_bit(task: Task, distributed: Callable[[Task], None]) -> None:
    """What the case's function says."""
    distributed(task)
