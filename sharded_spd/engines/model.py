"""A model's view of its parameters: their names, and which of the optimizer's tensors are flat."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from sharded_spd.engines.facts import facts_of
from sharded_spd.engines.fairscale import all_fairscale_units, fairscale_parts, fairscale_units
from sharded_spd.engines.flat import FlatPiece
from sharded_spd.engines.fsdp1 import all_fsdp1_units, fsdp1_parts, fsdp1_ties, fsdp1_units
from sharded_spd.engines.instances import instances_of
from sharded_spd.sharding.layout import ModelFacts
from sharded_spd.sharding.names import clean_fqn, clean_fqns


@dataclass(frozen=True, slots=True)
class ModelView:
    """`names`: the FQN of each parameter that is one layer; `parts`: the tensors that a wrapper cut.

    `fqns` are all the model's, in its order; `replicas` is the group of DistributedDataParallel; `facts` are
    further facts about the layers.
    """

    names: Mapping[Tensor, str] = field(default_factory=dict)
    parts: Mapping[Tensor, FlatPiece] = field(default_factory=dict)
    fqns: tuple[str, ...] = ()
    replicas: ProcessGroup | None = None
    facts: ModelFacts = field(default_factory=ModelFacts)


def view_model(model: Module) -> ModelView:
    """View the model as it is wrapped now; reshards FSDP2's gathered parameters first."""
    # An FSDP2 root stays unsharded after a forward without backward; its named parameters are then not
    # the sharded ones that the optimizer holds.
    for module in model.modules():
        reshard = getattr(module, "reshard", None)
        if callable(reshard) and hasattr(module, "set_reshard_after_backward"):
            reshard()
    raw_parts = {**dict(fsdp1_parts(model)), **dict(fairscale_parts(model))}
    everything = list(model.named_parameters(remove_duplicate=False))
    named = [(n, p) for n, p in everything if p not in raw_parts]
    raw = [name for name, _ in named]
    raw += [piece.layer for part in raw_parts.values() for piece in part.slices]
    ties = list(fsdp1_ties(model))
    with_ties = raw + [other for _, other in ties]
    by_raw = dict(zip(with_ties, clean_fqns(with_ties), strict=True))
    parts = {tensor: part.renamed(by_raw) for tensor, part in raw_parts.items()}
    names: dict[Tensor, str] = {}
    for name, param in named:
        names.setdefault(param, by_raw[name])
    for tensor, part in parts.items():
        if len(part.slices) == 1:
            names[tensor] = part.slices[0].layer
    group = model.process_group if isinstance(model, DistributedDataParallel) else None
    fqns = _in_order(raw, by_raw, model) if parts else tuple(by_raw[name] for name in raw)
    return ModelView(names, parts, fqns, group, facts_of(model, named, by_raw, ties))


def wrapper_groups(model: Module) -> list[ProcessGroup]:
    """The groups of two ranks and more over which wrappers in the model split or copy its parameters."""
    whole = [model] if isinstance(model, DistributedDataParallel) else []
    return _groups_of_wrappers([*whole, *fsdp1_units(model), *fairscale_units(model)])


def _groups_of_wrappers(wrappers: Iterable[Any]) -> list[ProcessGroup]:
    names = ("process_group", "_inter_node_pg")
    found = dict.fromkeys(getattr(wrapper, name, None) for wrapper in wrappers for name in names)
    return [group for group in found if group is not None and group.size() > 1]


def flat_groups(params: Iterable[Tensor]) -> list[ProcessGroup]:
    """The groups over which wrappers cut `params`, if their model is not known."""
    flat = {param for param in params if is_flat(param)}
    units = [*all_fsdp1_units(), *all_fairscale_units()] if flat else []
    return _groups_of_wrappers(unit for unit in units if not flat.isdisjoint(unit.parameters()))


def replicas_of(params: Iterable[Tensor]) -> ProcessGroup | None:
    """The ranks over which a DistributedDataParallel replicates `params`; None if no wrapper is found.

    A wrapper leaves no trace on its parameters, which are all that an optimizer has. A rank without any of
    them takes the ranks of all wrappers, if these are the same.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    tensors = set(params)
    if any(isinstance(p, DTensor) for p in tensors):
        return None
    wrappers = instances_of(DistributedDataParallel)
    groups = {w.process_group for w in wrappers if not tensors or not tensors.isdisjoint(w.parameters())}
    return groups.pop() if len(groups) == 1 else None


def _in_order(raw: Sequence[str], by_raw: Mapping[str, str], model: Module) -> tuple[str, ...]:
    """The FQNs as the unwrapped model's `named_parameters` had them; flat tensors list a unit's own first."""
    place: dict[str, int] = {}
    for name, _ in model.named_modules():
        place.setdefault(clean_fqn(name), len(place))
    ordered = sorted(raw, key=lambda name: place.get(clean_fqn(name).rpartition(".")[0], len(place)))
    return tuple(by_raw[name] for name in ordered)


def is_flat(param: Tensor) -> bool:
    """Whether a wrapper cut this tensor, so that only the wrapped model can explain it."""
    return bool(getattr(param, "_fsdp_flattened", False)) or hasattr(param, "_is_sharded")
