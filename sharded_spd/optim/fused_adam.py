"""Adam's step and the projection's sums in one pass over the memory, by the kernels."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sharded_spd.engines.dtensor import local_tensor
from sharded_spd.kernels import ADAM_NUMBERS, Backend, Moments, written
from sharded_spd.projection.items import Item
from sharded_spd.projection.step import Step

Lists = list[list[Tensor]]
"""A group's parameters with a gradient, their gradients and four kinds of state, as torch's Adam has them."""

_EXACT = (torch.float32, torch.float64)


def may_fuse(optimizer: Optimizer) -> bool:
    """Whether the groups ask for what the kernels do: Adam without a scaler, and pulls.

    Without any strength it is torch's own step that is asked for, to the last bit.
    """
    if not any(isinstance(g["weight_decay"], Tensor) or g["weight_decay"] for g in optimizer.param_groups):
        return False
    if any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf")):
        return False
    return all(_plain(group) for group in optimizer.param_groups)


def _plain(group: Mapping[str, Any]) -> bool:
    asked = group["fused"] or (group["fused"] is None and not group["foreach"])
    return bool(asked) and not group["differentiable"]


def fused_adam(optimizer: Optimizer, step: Step, gathered: Sequence[Lists]) -> set[Tensor]:
    """Step the parameters that the kernels can (modified in place), and give their sums to `step`.

    What comes back are these parameters; torch has to step the others. `gathered` is one entry per group.
    """
    items: list[Item] = []
    moments: list[Moments] = []
    numbers: list[Tensor] = []
    done: set[Tensor] = set()
    outer: list[Tensor] = []
    steppable = step.steppable()
    for group, (params, _, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps) in zip(
        optimizer.param_groups, gathered, strict=True
    ):
        fixed = not any(isinstance(x, Tensor) for x in (group["lr"], *group["betas"], group["eps"]))
        counts: list[Tensor] = []
        owned: list[int] = []
        for i, param in enumerate(params):
            own = steppable.get(param)
            # Half precision is stepped in it where torch's fused step is not asked for.
            if own is None or not (group["fused"] or param.dtype in _EXACT):
                continue
            state = Moments(*map(_here, (exp_avgs[i], exp_avg_sqs[i], *max_exp_avg_sqs[i : i + 1])))
            if (fixed or not steps[i].is_cpu) and _may_step(state, own[0].backend):
                done.add(param)
                whole = (param, exp_avgs[i], exp_avg_sqs[i], *max_exp_avg_sqs[i : i + 1])
                outer += [t for t in whole if isinstance(t, DTensor)]
                counts.append(steps[i])
                owned.append(len(own))
                items += own
                moments += [state] * len(own)
        if counts:
            numbers.append(_numbers(group, counts, owned, items[-1].tensors.weight.device))
    if items:
        step.adam_(items, moments, torch.cat(numbers))
        # A DTensor and its local tensor count apart, and it is the DTensor that autograd has saved.
        written(outer)
    return done


def _here(state: Tensor) -> Tensor:
    return local_tensor(state) if isinstance(state, DTensor) else state


def _may_step(state: Moments, backend: Backend) -> bool:
    one_dtype = len({t.dtype for t in state.tensors if t is not None}) == 1
    return one_dtype and backend.takes(*state.tensors)


def _numbers(
    group: Mapping[str, Any], counts: list[Tensor], owned: Sequence[int], device: torch.device
) -> Tensor:
    """Count the step (`counts` are modified in place), and give each item its row of Adam's numbers."""
    if counts[0].is_cpu:
        # By a tensor, as torch does on CPU: a number would be made a tensor once per parameter.
        torch._foreach_add_(counts, torch.ones(()), alpha=1.0)
        numbers = _on_host(group, torch.stack(counts).tolist(), owned)
        return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers
    torch._foreach_add_(counts, 1)
    return _on_device(group, torch.stack(counts), owned)


def _on_host(group: Mapping[str, Any], counts: Sequence[float], owned: Sequence[int]) -> Tensor:
    made: dict[float, bytes] = {}
    beta1, beta2 = group["betas"]
    rows = []
    for count, num_items in zip(counts, owned, strict=True):
        if count not in made:
            step_size, root = group["lr"] / (1 - beta1**count), math.sqrt(1 - beta2**count)
            made[count] = struct.pack("=5d", beta1, beta2, group["eps"], step_size, root)
        rows.append(made[count] * num_items)
    return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.float64).view(-1, len(ADAM_NUMBERS))


def _on_device(group: Mapping[str, Any], counts: Tensor, owned: Sequence[int]) -> Tensor:
    """The same where the counts are on a device, as with torch's fused and capturable steps: no waiting."""
    counts = counts.double()
    beta1, beta2, eps, lr = (
        x.to(counts.device, torch.float64) if isinstance(x, Tensor) else torch.full_like(counts[:1], x)
        for x in (*group["betas"], group["eps"], group["lr"])
    )
    columns = (beta1, beta2, eps, lr / (1 - beta1**counts), (1 - beta2**counts).sqrt())
    rows = torch.stack([column.expand_as(counts) for column in columns], dim=1)
    if all(num_items == 1 for num_items in owned):
        return rows
    return torch.cat([row.expand(num_items, -1) for row, num_items in zip(rows.split(1), owned, strict=True)])
