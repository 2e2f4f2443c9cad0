"""Optimizers that step full parameters, each on one rank, and broadcast them: ZeroRedundancyOptimizer, OSS.

The inner optimizer has this rank's share of the parameters and knows of no other rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from sharded_spd.engines.base import made_up_name
from sharded_spd.errors import UnsupportedError
from sharded_spd.sharding.names import clean_fqns


def share_of(target: Any) -> tuple[Optimizer, ProcessGroup] | None:
    """The inner optimizer of `target` for this rank's share, and the ranks; None for any other optimizer.

    Raises:
        UnsupportedError: there is none yet (`overlap_with_ddp`).
    """
    group = ranks_of(target)
    if group is None:
        return None
    inner = getattr(target, "optim", None)
    if not isinstance(inner, Optimizer):
        raise UnsupportedError(
            f"{type(target).__name__} has no optimizer of its own share yet; wanted it built with "
            "overlap_with_ddp=False, whose optimizer steps once the gradients are there"
        )
    return inner, group


def ranks_of(target: Any) -> ProcessGroup | None:
    """The ranks over which `target` partitions its parameters; None for any other optimizer."""
    if not callable(getattr(target, "consolidate_state_dict", None)):
        return None
    group: ProcessGroup = target.process_group if hasattr(target, "process_group") else target.group
    return group


def names_of(wholes: Sequence[Optimizer]) -> tuple[dict[Tensor, str], bool]:
    """A name for each parameter of the outer optimizers, the same on every rank, and whether all were given.

    The inner optimizers have the outer one's name lists, which do not fit their parameters.
    """
    names: dict[Tensor, str] = {}
    given: dict[Tensor, str] = {}
    for o, whole in enumerate(wholes):
        prefix = f"optimizers[{o}]." if len(wholes) > 1 else ""
        for g, group in enumerate(whole.param_groups):
            own = group.get("param_names", ())
            for i, param in enumerate(group["params"]):
                names[param] = prefix + made_up_name(g, i)
                if len(own) == len(group["params"]):
                    given[param] = own[i]
    names.update(zip(given, clean_fqns(list(given.values())), strict=True))
    return names, len(given) == len(names)
