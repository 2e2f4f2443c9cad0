"""How ranks exchange what only one of them knows: failures and entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import md5
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from sharded_spd import errors
from sharded_spd.sharding.layout import ShardLayout

T = TypeVar("T")
E = TypeVar("E", bound="tuple[Any, ...]")
_KINDS: dict[str, type[Exception]] = {
    c.__name__: c
    for c in (
        errors.AnchorError,
        errors.BindingError,
        errors.CheckpointError,
        errors.ConfigError,
        errors.UnsupportedError,
        OSError,
        TypeError,
        ValueError,
    )
}

Failure = tuple[int, str, str]
"""A rank, the class of its exception, and the text."""


def agree(action: Callable[[], T], groups: Sequence[ProcessGroup]) -> T:
    """Run `action`, which calls no collective, and raise on all ranks of `groups` if it raised on one.

    The ranks may name their groups in different orders.

    Raises:
        The rank's own exception; on the other ranks one of the same kind that names the failing rank.
    """
    return agree_and_tell(action, groups, lambda result: {})[0]


def agree_and_tell(
    action: Callable[[], T], groups: Sequence[ProcessGroup], tell: Callable[[T], Mapping[str, str]]
) -> tuple[T, dict[str, list[str]]]:
    """The same, and also the words that ranks `tell` of their results: for each key, all distinct values.

    Raises:
        The rank's own exception; on the other ranks one of the same kind that names the failing rank.
    """
    failure: Exception | None = None
    result: list[T] = []
    entries: list[Failure] = []
    try:
        result.append(action())
        entries = [(-1, key, value) for key, value in tell(result[0]).items()]
    except Exception as error:  # raised again below, once every rank knows
        failure = error
    found = flood(told_of(failure) or entries, groups) if groups else entries
    raise_first(failure, [entry for entry in found if entry[0] >= 0])
    words: dict[str, list[str]] = {}
    for _, key, value in found:
        words.setdefault(key, []).append(value)
    return result[0], words


def told_of(failure: Exception | None) -> list[Failure]:
    """The report of a rank's failure to the others."""
    if failure is None:
        return []
    rank = dist.get_rank() if dist.is_initialized() else 0
    return [(rank, type(failure).__name__, str(failure))]


def raise_first(own: Exception | None, failures: Sequence[Failure]) -> None:
    """Raise this rank's own failure, else that of the first rank that failed, if any did.

    Raises:
        The rank's own exception; on the other ranks one of the same kind that names the failing rank.
    """
    if own is not None:
        raise own
    if failures:
        rank, kind, text = failures[0]
        raise _KINDS.get(kind, RuntimeError)(f"rank {rank} failed: {text}")


def flood(entries: list[E], groups: Sequence[ProcessGroup]) -> list[E]:
    """The entries, such as failures, of all ranks that `groups` connect, sorted and without duplicates.

    Every rank visits its groups in the order of their ranks, which avoids deadlocks. It goes forth and back,
    so that entries also reach ranks that share no group with their origin; back only for groups with a member
    in another group, as all members know after the first pass.
    """
    found = entries
    ordered = sorted(groups, key=dist.get_process_group_ranks)
    twice = []
    for group in ordered:
        gathered: list[tuple[int, list[E]]] = [(0, []) for _ in range(group.size())]
        dist.all_gather_object(gathered, (len(ordered), found), group=group)
        found = _merged([theirs for _, theirs in gathered])
        if any(num_groups > 1 for num_groups, _ in gathered):
            twice.append(group)
    for group in reversed(twice):
        again: list[list[E]] = [[] for _ in range(group.size())]
        dist.all_gather_object(again, found, group=group)
        found = _merged(again)
    return found


def _merged(lists: Sequence[list[E]]) -> list[E]:
    return sorted({entry for entries in lists for entry in entries})


def union(own: Mapping[str, T], group: ProcessGroup | None) -> dict[str, T]:
    """The entries of all ranks of `group`; only this rank's if there is no group."""
    if group is None:
        return dict(own)
    gathered: list[Mapping[str, T]] = [{} for _ in range(group.size())]
    dist.all_gather_object(gathered, dict(own), group=group)
    return {key: value for entries in gathered for key, value in entries.items()}


def difference(layout: ShardLayout, facts: Mapping[str, Mapping[str, object]]) -> Exception | None:
    """The error if a scope's ranks differ in their layers, their facts or their order; None: they agree.

    Sums go by position. Collective over the scopes; the caller must raise the error on all ranks.

    Args:
        layout: this rank's layers and scopes.
        facts: by layer and name, the facts that must be the same on all ranks that sum the layer.
    """
    order = tuple(tuple(dist.get_process_group_ranks(scope.group)) for scope in layout.scopes)
    places = {fqn: [scope for scope in layout.scopes if fqn in scope.layers] for fqn in layout.fqns}
    found: list[Exception] = []
    for scope in sorted(layout.scopes, key=lambda scope: dist.get_process_group_ranks(scope.group)):
        members = set(scope.layers)
        described = [
            (fqn, {**facts[fqn], "place among the groups that split it": places[fqn].index(scope)})
            for fqn in layout.fqns
            if fqn in members
        ]
        digests: list[tuple[str, Any]] = [("", ())] * scope.group.size()
        digest = md5(repr(described).encode(), usedforsecurity=False).hexdigest()
        dist.all_gather_object(digests, (digest, order), group=scope.group)
        ranks = dist.get_process_group_ranks(scope.group)
        if len({digest for digest, _ in digests}) > 1:
            lists: list[list[tuple[str, dict[str, Any]]]] = [[] for _ in digests]
            dist.all_gather_object(lists, described, group=scope.group)
            found.append(_difference(lists, ranks))
        elif not all(_same_order(order, theirs) for _, theirs in digests):
            found.append(
                errors.BindingError(
                    "the process groups that split the layers are in another order on some of the ranks "
                    f"{ranks}; give all ranks the same parameters in the same order"
                )
            )
    return found[0] if found else None


def _same_order(own: Sequence[tuple[int, ...]], theirs: Sequence[tuple[int, ...]]) -> bool:
    """Whether two ranks have their common scopes in the same order."""
    return [s for s in own if s in theirs] == [s for s in theirs if s in own]


def _difference(lists: Sequence[Sequence[tuple[str, dict[str, Any]]]], ranks: Sequence[int]) -> Exception:
    names = [[fqn for fqn, _ in entries] for entries in lists]
    for has, theirs in zip(ranks, names, strict=True):
        for lacks, others in zip(ranks, names, strict=True):
            if missing := set(theirs) - set(others):
                return errors.BindingError(
                    f"the optimizer of rank {lacks} has no layer {min(missing)!r}, that of rank {has} does: "
                    "give every rank the same parameters, including those it holds nothing of (numel 0)"
                )
    for rank, entries in zip(ranks, lists, strict=True):
        for (fqn, first), (other, now) in zip(lists[0], entries, strict=True):
            if fqn != other:
                return errors.BindingError(
                    "the optimizers' parameters are in another order on some ranks; give all ranks the "
                    "same order"
                )
            for name in first:
                if first[name] != now.get(name):
                    return errors.ConfigError(
                        f"layer {fqn!r}: got {name} {first[name]!r} on rank {ranks[0]} and {now.get(name)!r} "
                        f"on rank {rank}, which share its elements; give all ranks the same settings"
                    )
    return errors.BindingError("the ranks describe their layers in different ways; give all the same")
