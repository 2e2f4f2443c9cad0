"""The ranks that save, load or export together: an error that only one of them sees is raised on all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from sharded_spd import errors
from sharded_spd.errors import CheckpointError
from sharded_spd.sharding.collectives import agree, flood

T = TypeVar("T")
_KINDS = (
    errors.AnchorError,
    errors.BindingError,
    errors.CheckpointError,
    errors.ConfigError,
    errors.UnsupportedError,
)
_NOTHING = ("", "nothing")


class Ranks:
    """Process groups of ranks that run one operation together; none: this process alone.

    The operation is split into phases, each run by `agree`: a rank that fails in one of them leaves no other
    rank waiting in the collectives of the next.
    """

    def __init__(self, groups: Sequence[ProcessGroup]) -> None:
        self.groups = tuple(groups)

    @property
    def first(self) -> bool:
        """Whether this is the first rank of each of the groups, which writes for all."""
        return all(group.rank() == 0 for group in self.groups)

    def agree(self, action: Callable[[], T], what: str) -> T:
        """The result of `action`, described by `what`; if it raises on one rank, all raise.

        A collective in it must fail on all ranks or on none. Foreign errors become CheckpointErrors, so that
        all ranks raise the same type.
        """

        def in_kind() -> T:
            try:
                return action()
            except _KINDS:
                raise
            except Exception as error:
                raise CheckpointError(f"{what}: {type(error).__name__}: {error}") from error

        return agree(in_kind, self.groups)

    def union(self, own: Iterable[str]) -> set[str]:
        """The names of all ranks."""
        return {name for (name,) in flood([(name,) for name in own], self.groups)}

    def compare(self, **facts: object) -> None:
        """Raise on every rank if one of `facts` differs between ranks.

        Raises:
            CheckpointError: names the fact, and two ranks with their values.
        """
        rank = dist.get_rank() if dist.is_initialized() else 0
        entries = flood([(rank, name, *_digest(value)) for name, value in facts.items()], self.groups)
        by_rank: dict[int, dict[str, tuple[str, str]]] = {}
        for other, name, digest, text in entries:
            by_rank.setdefault(other, {})[name] = (digest, text)
        agree(partial(_raise_difference, by_rank, list(facts)), self.groups)

    def shared(self, action: Callable[[], T], what: str) -> T:
        """Run `action`, described by `what`, on the first rank; returns its result on all ranks."""
        box: list[Any] = [self.agree(lambda: action() if self.first else None, what)]
        for group in self.groups:
            dist.broadcast_object_list(box, group=group, group_src=0)
        return box[0]  # type: ignore[no-any-return]


def everyone() -> list[ProcessGroup]:
    """The group of all ranks of the job; none if this process is alone."""
    return [dist.group.WORLD] if dist.is_initialized() and dist.group.WORLD is not None else []


def groups_of(model: Module) -> list[ProcessGroup]:
    """The groups of a model's own parameters and wrappers, each set of ranks once.

    These are the groups of DTensor meshes (FSDP2, tensor parallelism), of FSDP1's units and of DDP; none for
    plain parameters.
    """
    return list({tuple(dist.get_process_group_ranks(g)): g for g in _groups_in(model)}.values())


def _groups_in(model: Module) -> Iterable[ProcessGroup]:
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            yield module.process_group
        elif isinstance(module, FullyShardedDataParallel):
            own: tuple[Any, ...] = (module.process_group, getattr(module, "_inter_node_pg", None))
            yield from (group for group in own if group is not None)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if isinstance(tensor, DTensor):
                mesh = tensor.device_mesh
                yield from (mesh.get_group(axis) for axis in range(mesh.ndim))


def _raise_difference(facts: Mapping[int, Mapping[str, tuple[str, str]]], order: Sequence[str]) -> None:
    (one, known), *others = sorted(facts.items())
    for other, found in others:
        for name in [*order, *(name for name in found if name not in order)]:
            here, there = known.get(name, _NOTHING), found.get(name, _NOTHING)
            if here != there:
                raise CheckpointError(
                    f"{name}: the ranks differ: rank {one} has {here[1]}, rank {other} has "
                    f"{there[1]}; wanted the same call with the same arguments on all ranks"
                )


def _digest(value: object) -> tuple[str, str]:
    text = repr(value)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), f"{text:.80}"
