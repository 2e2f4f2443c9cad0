"""A step that is taken before the anchors are bound."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from sharded_spd.binding.records import flat
from sharded_spd.errors import BindingError
from sharded_spd.sharding.collectives import agree


def check_unbound(optimizer: Optimizer, groups: Sequence[ProcessGroup]) -> None:
    """An unbound step passes as the plain base where it moves nothing for lack of gradients.

    Collective over `groups`.

    Raises:
        BindingError: where any rank has a gradient that is not 0.
    """

    def check() -> None:
        for group in optimizer.param_groups:
            for grad in (p.grad for p in group["params"]):
                if grad is None:
                    continue
                local = getattr(grad, "_local_tensor", grad)
                if local.layout != torch.strided or bool(flat(local).any()):
                    raise BindingError(
                        f"{type(optimizer).__name__} was asked to step with gradients before its anchors are "
                        "bound: this would be the plain base optimizer; call bind() after sharding and "
                        "loading the pre-trained weights"
                    )

    agree(check, groups)
