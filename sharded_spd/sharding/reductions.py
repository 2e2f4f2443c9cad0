"""Sums over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sharded_spd.sharding.layout import Scope


def sum_over_scopes_(per_layer: Tensor, fqns: Sequence[str], scopes: Sequence[Scope]) -> None:
    """Sum `per_layer` `[num_layers, ...]` over its scopes, one after the other (modified in place)."""
    column = {fqn: i for i, fqn in enumerate(fqns)}
    for scope in scopes:
        columns = [column[fqn] for fqn in scope.layers if fqn in column]
        selected = per_layer[columns]
        all_reduce_(selected, scope.group)
        per_layer[columns] = selected


def needs_device(group: ProcessGroup) -> bool:
    """Whether the group only reduces tensors on its device, not in host memory."""
    backend = str(dist.get_backend_config(group))
    return "cpu" not in backend


def all_reduce_(payload: Tensor, group: ProcessGroup) -> None:
    """SUM over `group` (modified in place), on the device that the group's backend needs."""
    if payload.device.type == "cpu" and needs_device(group):
        on_device = payload.cuda()
        dist.all_reduce(on_device, group=group)
        payload.copy_(on_device)
    else:
        dist.all_reduce(payload, group=group)
