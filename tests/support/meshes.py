"""Meshes that all tasks of a launch share, and whole tensors gathered from them all at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Piece = tuple[tuple[int, ...], tuple[int, ...], bytes]
"""A shard: where it begins in the whole, its shape, and its bytes, which are sent faster than tensors."""


@functools.cache
def device_mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """Of all ranks; made once, for every group costs each rank threads for as long as it lives."""
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def full_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors, as this rank's replica has them, on every rank; collective.

    What is split over all ranks comes in one collective: one for each costs more than the step looked at.
    """
    pieces: dict[str, Piece] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor) and _split_over_all(tensor):
            _, offsets = compute_local_shape_and_global_offset(
                tensor.shape, tensor.device_mesh, tensor.placements
            )
            local = tensor.detach().to_local().contiguous()
            pieces[name] = (
                tuple(offsets),
                tuple(local.shape),
                local.view(-1).view(torch.uint8).numpy().tobytes(),
            )
    gathered: list[dict[str, Piece]] = [{}] * dist.get_world_size()
    if pieces:
        dist.all_gather_object(gathered, pieces)
    result = {}
    for name, tensor in tensors.items():
        if name in pieces:
            result[name] = _assembled(name, tensor, [gathered[rank][name] for rank in _replica(tensor)])
        else:
            tensor = tensor.detach()
            result[name] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
    return result


def _split_over_all(tensor: DTensor) -> bool:
    whole = tensor.device_mesh.size() == dist.get_world_size()
    return whole and not any(placement.is_partial() for placement in tensor.placements)


def _replica(tensor: DTensor) -> list[int]:
    """The ranks that together hold the copy of which this rank has a piece."""
    mesh = tensor.device_mesh
    here = mesh.get_coordinate()
    index = tuple(
        here[dim] if placement.is_replicate() else slice(None)
        for dim, placement in enumerate(tensor.placements)
    )
    return mesh.mesh[index].flatten().tolist()


def _assembled(name: str, like: DTensor, pieces: list[Piece]) -> Tensor:
    held = sum(math.prod(sizes) for _, sizes, _ in pieces)
    if held != like.numel():
        raise AssertionError(f"{name}: got {held} elements in all shards, wanted {tuple(like.shape)}")
    result = torch.empty(like.shape, dtype=like.dtype)
    for offsets, sizes, values in pieces:
        if values:
            index = tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))
            result[index] = torch.frombuffer(bytearray(values), dtype=like.dtype).view(sizes)
    return result
