"""The ranks that save, load or export together: what only one of them sees is raised on all of them."""

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
    """Process groups whose ranks run one operation together; none: this process alone.

    The operation is cut into phases that are each run by `agree`: a rank that fails alone in one of them
    leaves no other rank waiting in the collectives of the next.
    """

    def __init__(self, groups: Sequence[ProcessGroup]) -> None:
        self.groups = tuple(groups)

    @property
    def first(self) -> bool:
        """Whether this is the first rank of each of the groups, which writes for all."""
        return all(group.rank() == 0 for group in self.groups)

    def agree(self, action: Callable[[], T], what: str) -> T:
        """What `action`, which does `what`, gives; where it raised on one rank, all raise.

        A collective in it must fail on all ranks or on none. Foreign errors become CheckpointErrors, so that
        the kind is the same on all ranks.
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
        """Raise on every rank where one of `facts` is not the same on all of them.

        Raises:
            CheckpointError: it names the fact, and two ranks with what they have.
        """
        rank = dist.get_rank() if dist.is_initialized() else 0
        entries = flood([(rank, name, *_digest(value)) for name, value in facts.items()], self.groups)
        found: dict[int, dict[str, tuple[str, str]]] = {}
        for other, name, digest, text in entries:
            found.setdefault(other, {})[name] = (digest, text)
        agree(partial(_raise_difference, found, list(facts)), self.groups)

    def shared(self, action: Callable[[], T], what: str) -> T:
        """What `action`, which does `what`, gives on the first rank, on all of them."""
        box: list[Any] = [self.agree(lambda: action() if self.first else None, what)]
        for group in self.groups:
            dist.broadcast_object_list(box, group=group, group_src=0)
        return box[0]  # type: ignore[no-any-return]


def everyone() -> list[ProcessGroup]:
    """The group of all ranks of the job; none where this process is alone."""
    return [dist.group.WORLD] if dist.is_initialized() and dist.group.WORLD is not None else []


def groups_of(model: Module) -> list[ProcessGroup]:
    """The groups that a model's own parameters and wrappers tell of, each set of ranks once.

    Those of the meshes of DTensors (FSDP2, tensor parallelism), of FSDP1's units and of DDP. Empty where
    nothing tells: plain parameters.
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
