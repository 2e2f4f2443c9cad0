"""An error that every rank has to raise, and none may wait for another."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch.distributed as dist

from tests.support.engines import Engine


def refused(
    engine: Engine, action: Callable[[], object], kinds: tuple[type[Exception], ...], *patterns: str
) -> None:
    """`action` raises one of `kinds` on every rank, and each pattern is found in every rank's message."""
    text = ""
    try:
        action()
    except kinds as error:
        text = f"{type(error).__name__}: {error}"
    texts: list[str] = [""] * engine.world
    dist.all_gather_object(texts, text)
    silent = [rank for rank, message in enumerate(texts) if not message]
    assert not silent, f"ranks {silent} raised nothing; the others: {texts}"
    for rank, message in enumerate(texts):
        for pattern in patterns:
            assert re.search(pattern, message, re.DOTALL), f"rank {rank}: {pattern!r} is not in {message!r}"
