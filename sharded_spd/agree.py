"""What ranks have to tell each other: a failure that only one can see, entries that only one has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from sharded_spd import errors

T = TypeVar("T")
_KINDS = {
    c.__name__: c
    for c in (errors.AnchorError, errors.BindingError, errors.ConfigError, errors.UnsupportedError)
}


def agree(action: Callable[[], T], groups: Sequence[ProcessGroup]) -> T:
    """Run `action`, which calls no collective, and raise on all ranks of `groups` if it raised on one.

    Raises:
        The rank's own exception; on the other ranks one of the same kind that names the failing rank.
    """
    failure: Exception | None = None
    result: list[T] = []
    try:
        result.append(action())
    except Exception as error:  # raised again below, once every rank knows
        failure = error
    found: list[tuple[int, str, str]] = []
    if failure is not None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        found.append((rank, type(failure).__name__, str(failure)))
    # Forth and back, so that word of a failure in the last group also reaches ranks that share only the
    # first.
    for group in [*groups, *reversed(groups[:-1])]:
        gathered: list[list[tuple[int, str, str]]] = [[] for _ in range(group.size())]
        dist.all_gather_object(gathered, found, group=group)
        found = sorted({entry for entries in gathered for entry in entries})
    if failure is not None:
        raise failure
    if found:
        rank, kind, text = found[0]
        raise _KINDS.get(kind, RuntimeError)(f"rank {rank} failed: {text}")
    return result[0]


def union(own: Mapping[str, T], group: ProcessGroup | None) -> dict[str, T]:
    """The entries of all ranks of `group`; this rank's alone where there is none."""
    if group is None:
        return dict(own)
    gathered: list[Mapping[str, T]] = [{} for _ in range(group.size())]
    dist.all_gather_object(gathered, dict(own), group=group)
    return {key: value for entries in gathered for key, value in entries.items()}
