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
    """The groups that parameters and a model's wrappers tell of, and `others`: one for each set of ranks."""
    params = [*params, *(() if model is None else model.parameters())]
    meshes = {p.device_mesh: p for p in params if isinstance(p, DTensor)}
    groups = [group for param in meshes.values() for group in mesh_groups(param)]
    groups += flat_groups(params) if model is None else wrapper_groups(model)
    groups += [group for group in others if group is not None]
    return list(dict.fromkeys(one_per_ranks(groups).values()))


def one_per_ranks(groups: Iterable[ProcessGroup]) -> dict[ProcessGroup, ProcessGroup]:
    """For each group the one of the same ranks whose name is first, the same one on all of them.

    Equal meshes that were made twice have groups of their own: one reduction serves them.
    """
    ranks = {group: tuple(dist.get_process_group_ranks(group)) for group in dict.fromkeys(groups)}
    first: dict[tuple[int, ...], ProcessGroup] = {}
    for group, own in ranks.items():
        first[own] = min(first.get(own, group), group, key=lambda g: str(g.group_name))
    return {group: first[own] for group, own in ranks.items()}


def scopes_of(pieces: Mapping[str, tuple[ShardSlice, FlatPiece]]) -> tuple[Scope, ...]:
    """The groups that split layers, each with its layers; `pieces` by FQN."""
    first = one_per_ranks(group for _, part in pieces.values() for group in part.split)
    layers: dict[ProcessGroup, list[str]] = {group: [] for group in first.values()}
    for fqn, (_, part) in pieces.items():
        for group in part.split:
            layers[first[group]].append(fqn)
    return tuple(Scope(group, tuple(own)) for group, own in layers.items())
