"""The process groups of parameters: those whose ranks agree, and those that split a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn import Module

from sharded_spd.engines.dtensor import mesh_groups
from sharded_spd.engines.flat import FlatPiece
from sharded_spd.engines.model import flat_groups, wrapper_groups
from sharded_spd.sharding.layout import Scope, ShardSlice


def known_groups(
    params: Sequence[Tensor],
    model: Module | None,
    others: Iterable[ProcessGroup | None],
) -> list[ProcessGroup]:
    """The groups of parameters and of a model's wrappers, and `others`: one for each set of ranks."""
    params = [*params, *(() if model is None else model.parameters())]
    meshes = {p.device_mesh: p for p in params if isinstance(p, DTensor)}
    groups = [group for param in meshes.values() for group in mesh_groups(param)]
    groups += flat_groups(params) if model is None else wrapper_groups(model)
    groups += [group for group in others if group is not None]
    return list(dict.fromkeys(one_per_ranks(groups).values()))


def one_per_ranks(groups: Iterable[ProcessGroup]) -> dict[ProcessGroup, ProcessGroup]:
    """Map each group to the first by name of those with the same ranks; the same one on all ranks.

    Equal meshes created twice have separate groups: one reduction serves both.
    """
    ranks = {group: tuple(dist.get_process_group_ranks(group)) for group in dict.fromkeys(groups)}
    first: dict[tuple[int, ...], ProcessGroup] = {}
    for group, members in ranks.items():
        first[members] = min(first.get(members, group), group, key=lambda g: str(g.group_name))
    return {group: first[members] for group, members in ranks.items()}


def scopes_of(pieces: Mapping[str, tuple[ShardSlice, FlatPiece]]) -> tuple[Scope, ...]:
    """The groups that split layers, each with its layers; `pieces` by FQN."""
    first = one_per_ranks(group for _, part in pieces.values() for group in part.split)
    layers: dict[ProcessGroup, list[str]] = {group: [] for group in first.values()}
    for fqn, (_, part) in pieces.items():
        for group in part.split:
            layers[first[group]].append(fqn)
    return tuple(Scope(group, tuple(fqns)) for group, fqns in layers.items())
