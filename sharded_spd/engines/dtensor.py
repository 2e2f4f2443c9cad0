"""This rank's shard of a DTensor parameter (FSDP2, HSDP, tensor parallelism); a plain one is not sharded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sharded_spd.errors import UnsupportedError
from sharded_spd.sharding.layout import Box, FlatRange, ShardSlice


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's shard; shares the tensor's storage."""
    if isinstance(tensor, DTensor):
        # The caller's no_grad() makes it the same tensor; a decorator here would cost more than the call.
        tensor = tensor.to_local()
        if isinstance(tensor, AsyncCollectiveTensor):
            tensor = tensor.wait()
    return tensor.detach()


def local_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This rank's shards."""
    return [local_tensor(tensor) for tensor in tensors]


def shard_groups(tensor: Tensor) -> Iterator[ProcessGroup]:
    """The groups of the mesh axes that split the tensor, in mesh order.

    Tests `is_replicate`, since a strided shard is not a `Shard`, and its `is_shard()` is False.
    """
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        for axis, placement in enumerate(tensor.placements):
            if not placement.is_replicate() and mesh.size(axis) > 1:
                yield mesh.get_group(axis)


def mesh_groups(tensor: Tensor) -> Iterator[ProcessGroup]:
    """The groups of all mesh axes of size > 1; one group if there are none."""
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        axes = [axis for axis in range(mesh.ndim) if mesh.size(axis) > 1]
        yield from (mesh.get_group(axis) for axis in axes or [0])


Boxes = dict[tuple[Any, ...], tuple[Any, ...]]
"""What this rank holds, by shape, placements and mesh: a model's layers share a few combinations."""


def whole_slice(fqn: str, tensor: Tensor, known: Boxes | None = None) -> ShardSlice:
    """The slice that `tensor` holds of layer `fqn` on this rank.

    `known` (modified in place) caches the blocks that torch computes: for a layer split along two mesh axes,
    torch builds a list as long as the axis.

    Raises:
        UnsupportedError: the local shard of these placements is not a single block of the layer.
    """
    if not isinstance(tensor, DTensor):
        return ShardSlice(fqn, 0, tensor.numel(), FlatRange(0))
    if any(p.is_partial() for p in tensor.placements):
        raise UnsupportedError(
            f"layer {fqn!r} is a parameter with placements {tensor.placements}; wanted Replicate or Shard: "
            "redistribute the parameter before it is given to the optimizer"
        )
    known = {} if known is None else known
    key = (tuple(tensor.shape), tensor.placements, tensor.device_mesh)
    if key not in known:
        known[key] = tuple(tensor.__create_chunk_list__())
    chunks = known[key]
    numel = local_tensor(tensor).numel()
    box = chunks[0]
    if len(chunks) != 1 or prod(box.sizes) != numel:
        raise UnsupportedError(
            f"layer {fqn!r} with placements {tensor.placements} on {tensor.device_mesh} holds {numel} "
            f"elements on this rank that are not one block of the layer (got {chunks}); wanted a contiguous "
            "shard"
        )
    return ShardSlice(fqn, 0, numel, Box(tuple(box.offsets), tuple(box.sizes)))


def aligned_grad(param: Tensor) -> Tensor | None:
    """This rank's shard of the gradient, in the parameter's own placements.

    A gradient with other placements (Partial under tensor parallelism) is redistributed once and put back
    into `.grad`: otherwise the base optimizer would repeat the collective.
    """
    grad = param.grad
    if grad is None:
        return None
    if isinstance(param, DTensor):
        if not isinstance(grad, DTensor):
            raise UnsupportedError(
                f"got a gradient of type {type(grad).__name__} for a DTensor parameter of shape "
                f"{tuple(param.shape)}; wanted a DTensor: leave .grad to autograd, or wrap it with "
                "DTensor.from_local"
            )
        if grad.placements != param.placements:
            with torch.no_grad():
                param.grad = grad = grad.redistribute(placements=param.placements)
    return local_tensor(grad)


def aligned_grads(params: Sequence[Tensor]) -> list[Tensor | None]:
    """This rank's shards of the gradients; see `aligned_grad`."""
    return [aligned_grad(param) for param in params]


def align_grads(optimizer: Optimizer) -> None:
    """Redistribute all gradients that need it, on a failed rank: the others wait for it there."""
    for param in (p for group in optimizer.param_groups for p in group["params"]):
        if isinstance(param, DTensor) and param.grad is not None:
            with suppress(Exception):
                aligned_grad(param)


def as_dtensor(local: Tensor, like: Tensor) -> Tensor:
    """Give a local shard `[numel]` the distribution of `like`."""
    local = local.view(local_tensor(like).shape)
    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
