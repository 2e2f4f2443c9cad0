"""Adam's step and the projection's sums in one pass over the memory, by the compiled kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from sharded_spd.binding import flat
from sharded_spd.engines.dtensor import local_tensor
from sharded_spd.kernels.cpu import AdamSlice, Slice, adam, can_sum
from sharded_spd.step import Step
from sharded_spd.sums import Item


def may_fuse(optimizer: Optimizer) -> bool:
    """Whether the groups ask for what the kernel does: torch's fused Adam, without a scaler, and pulls.

    Without any strength it is torch's own step that is asked for, to the last bit.
    """
    if not any(isinstance(g["weight_decay"], Tensor) or g["weight_decay"] for g in optimizer.param_groups):
        return False
    if any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf")):
        return False
    return all(_plain(group) for group in optimizer.param_groups)


def _plain(group: Mapping[str, Any]) -> bool:
    numbers = (group["lr"], *group["betas"], group["eps"])
    return (
        bool(group["fused"])
        and not group["capturable"]
        and not group["differentiable"]
        and not any(isinstance(x, Tensor) for x in numbers)
    )


def fused_adam(optimizer: Optimizer, step: Step, init: Callable[[dict[str, Any]], object]) -> set[Tensor]:
    """Step the parameters that the kernel can (modified in place), and give their sums to `step`.

    What comes back are these parameters; torch has to step the others. `init` makes a group's missing state.
    """
    done: set[Tensor] = set()
    items = step.whole_items()
    slices: list[AdamSlice] = []
    stepped: list[Item] = []
    for group in optimizer.param_groups:
        init(group)
        for param in group["params"]:
            own = items.get(param, ())
            made = _slices(own, param, group, optimizer.state[param]) if own else None
            if made is None:
                continue
            optimizer.state[param]["step"] += 1
            slices += made
            stepped += own
            done.add(param)
    if slices:
        step.add_fused(stepped, adam(slices))
    return done


def _slices(
    items: Sequence[Item], param: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> list[AdamSlice] | None:
    moments = [state["exp_avg"], state["exp_avg_sq"], state["max_exp_avg_sq"] if group["amsgrad"] else None]
    mean, square, most = (None if t is None else local_tensor(t) for t in moments)
    step = state["step"]
    if mean is None or square is None or step.device.type != "cpu":
        return None
    if not can_sum(mean, square, most) or len({t.dtype for t in (mean, square, most) if t is not None}) > 1:
        return None
    made = []
    for item in items:
        weight, grad = flat(item.shard.tensor), item.shard.grad
        if (
            grad is None
            or not item.shard.tensor.is_contiguous()
            or not isinstance(item.anchor, Tensor | None)
        ):
            return None
        grad = flat(grad)
        if not can_sum(weight, grad, item.anchor) or isinstance(item.grad_factor, Tensor):
            return None
        cut = item.cut
        made.append(
            AdamSlice(
                Slice(weight[cut], item.anchor, grad[cut], item.grad_factor),
                flat(mean)[cut],
                flat(square)[cut],
                None if most is None else flat(most)[cut],
                group["lr"],
                (group["betas"][0], group["betas"][1]),
                group["eps"],
                step.item() + 1,
            )
        )
    return made
