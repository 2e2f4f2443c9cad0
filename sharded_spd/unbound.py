"""A step that is taken before the anchors are bound."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from sharded_spd.binding import flat
from sharded_spd.errors import BindingError
from sharded_spd.layout import ShardLayout
from sharded_spd.stats import all_reduce_


def check_unbound(optimizer: Optimizer, layout: ShardLayout | None) -> None:
    """An unbound step passes as the plain base where it moves nothing for lack of gradients.

    Collective over the layout's scopes.

    Raises:
        BindingError: where any rank has a gradient that is not 0.
    """
    live = torch.zeros(1)
    for group in optimizer.param_groups:
        for grad in (p.grad for p in group["params"]):
            if grad is None:
                continue
            local = getattr(grad, "_local_tensor", grad)
            if local.layout != torch.strided or bool(flat(local).any()):
                live.fill_(1)
    for scope in layout.scopes if layout is not None else ():
        all_reduce_(live, scope.group)
    if bool(live):
        raise BindingError(
            f"{type(optimizer).__name__} was asked to step with gradients before its anchors are bound: "
            "this would be the plain base optimizer; call bind() after sharding and loading the "
            "pre-trained weights"
        )
