"""What ranks have to tell each other: a failure that only one can see, entries that only one has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import md5
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from sharded_spd import errors
from sharded_spd.layout import ShardLayout

T = TypeVar("T")
_KINDS = {
    c.__name__: c
    for c in (
        errors.AnchorError,
        errors.BindingError,
        errors.CheckpointError,
        errors.ConfigError,
        errors.UnsupportedError,
    )
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


def check_same_layers(layout: ShardLayout, groups: Sequence[ProcessGroup]) -> None:
    """Raise unless each scope has the same layers on all its ranks, in one order: sums go by position.

    Raises:
        BindingError: on all ranks of `groups`; it names a layer that one rank has and another has not.
    """
    different: list[str] = []
    for scope in layout.scopes:
        members = set(scope.layers)
        own = [fqn for fqn in layout.fqns if fqn in members]
        digests: list[str] = [""] * scope.group.size()
        dist.all_gather_object(digests, md5(repr(own).encode()).hexdigest(), group=scope.group)
        if len(set(digests)) > 1:
            lists: list[list[str]] = [[] for _ in digests]
            dist.all_gather_object(lists, own, group=scope.group)
            different.append(_difference(lists, dist.get_process_group_ranks(scope.group)))

    def raise_difference() -> None:
        if different:
            raise errors.BindingError(different[0])

    agree(raise_difference, groups)


def _difference(lists: Sequence[Sequence[str]], ranks: Sequence[int]) -> str:
    for has, theirs in zip(ranks, lists, strict=True):
        for lacks, others in zip(ranks, lists, strict=True):
            if missing := set(theirs) - set(others):
                return (
                    f"the optimizer of rank {lacks} has no layer {min(missing)!r}, that of rank {has} has: "
                    "give every rank the same parameters, also those of which it holds nothing (numel 0)"
                )
    return "the optimizers' parameters stand in another order on some ranks; give all ranks the same order"
