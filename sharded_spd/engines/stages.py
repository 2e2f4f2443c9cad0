"""Detects a pipeline stage: the layers before and after it are not known on this rank."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module

from sharded_spd.engines.instances import instances_of

_STAGES = "torch.distributed.pipelining.stage"
_AXES = ("pp", "pipe", "pipeline", "stage")
_NUMBERED = re.compile(r"(.*?)\.(\d+)\.")


def is_stage(params: Sequence[Tensor], model: Module | None, fqns: Iterable[str]) -> bool:
    """Whether `model`, or without one `params` (named `fqns`), is recognisably a part of a model.

    The signs are torch's pipeline stages, a submesh of a mesh with a stage axis, and layer numbers that begin
    above 0. The first stage of a pipeline that uses neither looks like a full model.
    """
    shown = list(params) if model is None else list(model.parameters())
    if _in_stages(set(shown)) or any(_has_stage_axis(p) for p in shown if isinstance(p, DTensor)):
        return True
    if model is None:
        return _begins_late(fqns)
    return any(_misses_first(module) for module in model.modules())


def _in_stages(shown: set[Tensor]) -> bool:
    """Whether all parameters belong to this rank's stages, and other ranks have further stages."""
    module = sys.modules.get(_STAGES)
    if module is None or not shown:
        return False
    stages = instances_of(module._PipelineStageBase)
    own = [stage for stage in stages if not shown.isdisjoint(stage.submod.parameters())]
    inside = {p for stage in own for p in stage.submod.parameters()}
    return shown <= inside and any(stage.num_stages > len(own) for stage in own)


def _has_stage_axis(param: DTensor) -> bool:
    mesh = param.device_mesh
    find = getattr(mesh, "_get_root_mesh", None)
    root = mesh if find is None else find()
    own, names = mesh.mesh_dim_names or (), root.mesh_dim_names or ()
    return any(name in _AXES and name not in own and root.size(i) > 1 for i, name in enumerate(names))


def _misses_first(module: Module) -> bool:
    """Whether a container's children, with or without weights, are numbered without a gap from above 0."""
    return _is_late({int(name) for name, _ in module.named_children() if name.isdecimal()})


def _begins_late(fqns: Iterable[str]) -> bool:
    """The same by names alone, of two or more: a single layer may follow one without weights."""
    numbers: dict[str, set[int]] = {}
    for fqn in fqns:
        for found in _NUMBERED.finditer(fqn):
            numbers.setdefault(fqn[: found.start(2)], set()).add(int(found[2]))
    return any(len(own) > 1 and _is_late(own) for own in numbers.values())


def _is_late(numbers: set[int]) -> bool:
    return bool(numbers) and min(numbers) > 0 and max(numbers) - min(numbers) + 1 == len(numbers)
