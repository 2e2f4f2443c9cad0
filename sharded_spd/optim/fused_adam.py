"""Adam's step and the projection's sums in one pass over the memory, by the kernels."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sharded_spd.engines.dtensor import local_tensors
from sharded_spd.kernels.base import ADAM_NUMBERS, Backend, Moments
from sharded_spd.projection.slices import LocalSlice
from sharded_spd.projection.step import Step

Lists = list[list[Tensor]]
"""A group's parameters with a gradient, their gradients and four kinds of state, as torch's Adam has them."""

_EXACT = (torch.float32, torch.float64)


def may_fuse(optimizer: Optimizer) -> bool:
    """Whether the groups ask for what the kernels do: Adam without a scaler, and pulls.

    Without any strength, the step must equal torch's own to the last bit.
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

    Returns these parameters; torch must step the others. `gathered` has one entry per group.
    """
    slices: list[LocalSlice] = []
    moments: list[Moments] = []
    numbers: list[Tensor] = []
    done: set[Tensor] = set()
    outer: list[Tensor] = []
    fusable = step.fusable()
    for group, lists in zip(optimizer.param_groups, gathered, strict=True):
        counts: list[Tensor] = []
        num_slices: list[int] = []
        for i, state in _states(group, lists, fusable):
            param, pieces = lists[0][i], fusable[lists[0][i]]
            done.add(param)
            tensors = (param, *(kind[i] for kind in lists[2:5] if kind))
            outer += [t for t in tensors if isinstance(t, DTensor)]
            counts.append(lists[5][i])
            num_slices.append(len(pieces))
            slices += pieces
            moments += [state] * len(pieces)
        if counts:
            numbers.append(_numbers(group, counts, num_slices, slices[-1].tensors.weight.device))
    if slices:
        step.adam_(slices, moments, torch.cat(numbers))
        # A DTensor and its local tensor have separate version counters; autograd saves the DTensor's.
        increment_version(outer)
    return done


def _states(
    group: Mapping[str, Any], lists: Lists, fusable: Mapping[Tensor, Sequence[LocalSlice]]
) -> list[tuple[int, Moments]]:
    """The parameters of a group that the kernels step, by index, with this rank's moments."""
    params, _, *states, steps = lists
    fixed = not any(isinstance(x, Tensor) for x in (group["lr"], *group["betas"], group["eps"]))
    # Without fused=True, torch's Adam steps half-precision parameters in half precision.
    places = [
        i
        for i, param in enumerate(params)
        if param in fusable and (group["fused"] or param.dtype in _EXACT) and (fixed or not steps[i].is_cpu)
    ]
    kinds = [kind for kind in states if kind]
    local = local_tensors([kind[i] for i in places for kind in kinds])
    rows = [local[at : at + len(kinds)] for at in range(0, len(local), max(len(kinds), 1))]
    by_backend: dict[Backend, list[tuple[int, list[Tensor]]]] = {}
    for i, row in zip(places, rows, strict=True):
        if len({t.dtype for t in row}) == 1:
            by_backend.setdefault(fusable[params[i]][0].backend, []).append((i, row))
    taken = []
    for backend, entries in by_backend.items():
        all_taken = backend.takes(*(t for _, row in entries for t in row))
        taken += entries if all_taken else [(i, row) for i, row in entries if backend.takes(*row)]
    return [(i, Moments(*row)) for i, row in sorted(taken, key=lambda entry: entry[0])]


def _numbers(
    group: Mapping[str, Any], counts: list[Tensor], num_slices: Sequence[int], device: torch.device
) -> Tensor:
    """Count the step (`counts` are modified in place), and give each slice its row of Adam's numbers."""
    if counts[0].is_cpu:
        # Add a tensor, as torch does on CPU: a number would be converted once per parameter.
        torch._foreach_add_(counts, torch.ones(()), alpha=1.0)
        numbers = _on_host(group, torch.stack(counts).tolist(), num_slices)
        return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers
    torch._foreach_add_(counts, 1)
    return _on_device(group, torch.stack(counts), num_slices)


def _on_host(group: Mapping[str, Any], counts: Sequence[float], num_slices: Sequence[int]) -> Tensor:
    by_count: dict[float, bytes] = {}
    beta1, beta2 = group["betas"]
    rows = []
    for count, num in zip(counts, num_slices, strict=True):
        if count not in by_count:
            step_size, root = group["lr"] / (1 - beta1**count), math.sqrt(1 - beta2**count)
            by_count[count] = struct.pack("=5d", beta1, beta2, group["eps"], step_size, root)
        rows.append(by_count[count] * num)
    return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.float64).view(-1, len(ADAM_NUMBERS))


def _on_device(group: Mapping[str, Any], counts: Tensor, num_slices: Sequence[int]) -> Tensor:
    """The same for counts on a device, as with torch's fused and capturable steps: no host sync."""
    counts = counts.double()
    beta1, beta2, eps, lr = (
        x.to(counts.device, torch.float64) if isinstance(x, Tensor) else torch.full_like(counts[:1], x)
        for x in (*group["betas"], group["eps"], group["lr"])
    )
    columns = (beta1, beta2, eps, lr / (1 - beta1**counts), (1 - beta2**counts).sqrt())
    rows = torch.stack([column.expand_as(counts) for column in columns], dim=1)
    if all(num == 1 for num in num_slices):
        return rows
    return torch.cat([row.expand(num, -1) for row, num in zip(rows.split(1), num_slices, strict=True)])
