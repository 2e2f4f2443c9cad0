"""Refusals of parameters: what one must not be or become, with the error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sharded_spd.engines.base import made_up_name
from sharded_spd.engines.flat import FlatPiece
from sharded_spd.errors import BindingError, UnsupportedError
from sharded_spd.sharding.layout import BoundShard

REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_left_alone(param: Tensor) -> bool:
    """Whether a parameter is ignored: frozen, and of a dtype that no optimizer could step.

    These are quantised weights: bytes, integers, float8.
    """
    return param.dtype not in REAL and not param.requires_grad


def name_of(group: Mapping[str, Any], g: int, i: int) -> str:
    """The name of parameter `i` of param group `g`: by its group, else by its position."""
    names = group.get("param_names", ())
    return str(names[i]) if i < len(names) else made_up_name(g, i)


def raise_unreal(name: str, param: Tensor) -> NoReturn:
    """Raise UnsupportedError: `param` is to be trained, but has no real floating-point dtype."""
    raise UnsupportedError(
        f"layer {name!r} has dtype {param.dtype} and is to be trained; wanted a real floating-point dtype "
        f"({', '.join(str(dtype).removeprefix('torch.') for dtype in REAL)}), or a frozen parameter "
        "(requires_grad=False)"
    )


def raise_unknown(optimizer: Optimizer, group: Mapping[str, Any], g: int, i: int) -> NoReturn:
    """Raise BindingError: parameter `i` of param group `g` is newer than the binding."""
    raise BindingError(
        f"parameter {name_of(group, g, i)!r} (shape {tuple(group['params'][i].shape)}) of "
        f"{type(optimizer).__name__} is not bound: it was added, or put in place of another one, after "
        "binding; call bind() after sharding, after adding groups, and before the next step"
    )


def raise_moved(param: Tensor, local: Tensor, part: FlatPiece) -> None:
    """Raise BindingError if `local`, the shard of `param`, is not what was bound."""
    fqn = part.slices[0].layer
    if local.numel() != part.numel:
        raise BindingError(
            f"the tensor of layer {fqn!r} has {local.numel()} elements, wanted {part.numel}: it was "
            "sharded since the anchors were bound (call bind(model) with the wrapped model), or a "
            "forward has gathered it and no backward has followed"
        )
    if not isinstance(param, DTensor) and param.untyped_storage().size() == 0:
        raise BindingError(
            f"layer {fqn!r} has no memory: the optimizer holds FSDP's gathered parameter, which is freed "
            "after use, not its shard; build the optimizer right after fully_shard, or call "
            "model.reshard() before it is built"
        )


def check_dtype(now: torch.dtype, bound: torch.dtype, shard: BoundShard) -> None:
    """Raise BindingError unless the dtype is wider than the bound one, and no step was taken yet."""
    wider = torch.promote_types(now, bound) == now
    if wider and not shard.has_state:
        return
    raise BindingError(
        f"layer {shard.slices[0].layer!r} was {bound} when its anchor was bound and is {now} now: the "
        "optimizer's state, the anchor and the gradients would be of two dtypes; change the dtype of the "
        "pre-trained model first, then build the optimizer and call bind() (or anchor='deferred' and "
        "bind() after the change), and keep it while training"
    )
