"""Where a layer's elements lie in the tensors that DeepSpeed's inner optimizer updates, and a check of it.

ZeRO gives its inner optimizer one-dimensional partitions ("flats") of many layers. Only private attributes
say how they are cut, so everything is checked against the live weights; ranks do not communicate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sharded_spd.engines.flat import overlap
from sharded_spd.errors import UnsupportedError
from sharded_spd.sharding.layout import FlatRange, ShardSlice

SUPPORTED = "0.16.9 to 0.19"
_CHUNK = 2**22


@dataclass(frozen=True, slots=True)
class Flat:
    """One tensor of the inner optimizer.

    `low` are the model's working weights, in the same order; `preloaded`: `low`, not `tensor`, holds the
    weights as loaded. `process_group` splits the layers; None: each rank holds full layers.
    """

    tensor: Tensor
    low: Tensor
    slices: tuple[ShardSlice, ...]
    param_group: int
    process_group: ProcessGroup | None = None
    preloaded: bool = False


def read_flats(wrapper: Any, names: Mapping[Tensor, str]) -> list[Flat]:
    """The flats of DeepSpeed's `wrapper` around the inner optimizer, in the order of their steps.

    Raises:
        UnsupportedError: the layout of this DeepSpeed is unknown.
    """
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        flats = _stage3(wrapper, names)
    elif hasattr(wrapper, "single_partition_of_fp32_groups"):
        partitions = _need(wrapper, "parallel_partitioned_bit16_groups")
        masters, groups = wrapper.single_partition_of_fp32_groups, _need(wrapper, "bit16_groups")
        flats = _partitioned(wrapper, masters, partitions, groups, names)
    elif hasattr(wrapper, "fp32_groups_flat_partition"):
        masters, groups = wrapper.fp32_groups_flat_partition, _need(wrapper, "bf16_groups")
        partitions = _need(wrapper, "bf16_partitioned_groups")
        flats = _partitioned(wrapper, masters, partitions, groups, names)
    elif hasattr(wrapper, "fp32_groups_flat"):
        flats = _whole_groups(wrapper, names)
    elif hasattr(wrapper, "fp32_groups"):
        flats = _whole_layers(wrapper, names)
    else:
        raise _moved(f"the optimizer is a {wrapper.__class__.__name__}, which is not known")
    for flat in flats:
        _check_tiling(flat)
        if not flat.preloaded:
            _check_values(flat)
    return flats


def _partitioned(
    wrapper: Any,
    masters: Sequence[Tensor],
    partitions: Sequence[Sequence[Tensor]],
    groups: Sequence[Sequence[Tensor]],
    names: Mapping[Tensor, str],
) -> list[Flat]:
    """Stages 1 and 2: every weight is a view of one buffer per group; each rank owns a partition of it.

    Compares pointers, which is right for any order and alignment that DeepSpeed chooses.
    """
    process_groups = _need(wrapper, "real_dp_process_group")
    flats = []
    for g, (master, params) in enumerate(zip(masters, groups, strict=True)):
        part = partitions[g][dist.get_rank(process_groups[g])]
        if part.numel() != master.numel():
            raise _moved(f"group {g}: the partition has {part.numel()} elements, its master {master.numel()}")
        begin, buffer = int(part.storage_offset()), part.untyped_storage().data_ptr()
        slices = []
        for param in params:
            weight, fqn = param.data, _name(param, names)
            if weight.untyped_storage().data_ptr() != buffer or not weight.is_contiguous():
                raise _moved(f"layer {fqn!r} is no view of its group's buffer")
            start = int(weight.storage_offset())
            slices.append(overlap(fqn, start, weight.numel(), (begin, begin + part.numel())))
        flats.append(Flat(master, part, tuple(slices), g, process_groups[g]))
    return flats


def _stage3(wrapper: Any, names: Mapping[Tensor, str]) -> list[Flat]:
    """Stage 3: a sub-group holds this rank's partitions of its layers, each padded separately."""
    positions, to_id = _need(wrapper, "grad_position"), _need(wrapper, "get_param_id")
    group_of, lows = _need(wrapper, "sub_group_to_group_id"), _need(wrapper, "fp16_partitioned_groups_flat")
    flats = []
    for i, params in enumerate(_need(wrapper, "fp16_groups")):
        low, offset, slices, process_group = lows[i], 0, [], None
        if low is None:
            raise UnsupportedError(
                "the parameters are offloaded to NVMe, where their layout cannot be checked; got "
                'offload_param.device "nvme", wanted "cpu" or none'
            )
        for param in params:
            fqn, group = _name(param, names), _need(param, "ds_process_group")
            if process_group is not None and group is not process_group:
                raise _moved(f"layer {fqn!r} is split over other ranks than its sub-group {i}")
            process_group = group
            where = tuple(positions[to_id(param)])
            length = int(param.partition_numel())
            if where != (i, offset, length):
                raise _moved(f"layer {fqn!r} is said to lie at {where}, wanted {(i, offset, length)}")
            start = dist.get_rank(process_group) * length
            piece = overlap(fqn, 0, int(param.ds_numel), (start, start + length), at=offset)
            partition = _need(param, "ds_tensor").detach().reshape(-1)[: piece.numel]
            if not torch.equal(partition.to(low.device), low[offset : offset + piece.numel]):
                raise _moved(f"layer {fqn!r}: its partition is not at {offset} of sub-group {i}")
            slices.append(piece)
            offset += length
        master = wrapper.fp32_partitioned_groups_flat[i]
        flats.append(Flat(master, low, tuple(slices), group_of[i], process_group))
    return flats


def _whole_groups(wrapper: Any, names: Mapping[Tensor, str]) -> list[Flat]:
    """Stage 0 in half precision around a fused optimizer: one whole flat per group."""
    flats = []
    lows = _need(wrapper, "fp16_groups_flat")
    for g, (master, params) in enumerate(zip(wrapper.fp32_groups_flat, wrapper.fp16_groups, strict=True)):
        slices, begin = [], lows[g].data_ptr()
        for param in params:
            offset = (param.data.data_ptr() - begin) // lows[g].element_size()
            slices.append(ShardSlice(_name(param, names), offset, param.numel(), FlatRange(0)))
        flats.append(Flat(master, lows[g], tuple(slices), g, preloaded=True))
    return flats


def _whole_layers(wrapper: Any, names: Mapping[Tensor, str]) -> list[Flat]:
    """Stage 0 in half precision around any other optimizer: one master per layer."""
    flats = []
    for g, (masters, params) in enumerate(
        zip(wrapper.fp32_groups, _need(wrapper, "fp16_groups"), strict=True)
    ):
        for master, param in zip(masters, params, strict=True):
            if master.shape != param.shape:
                raise _moved(f"a master of shape {tuple(master.shape)} for one of {tuple(param.shape)}")
            piece = ShardSlice(_name(param, names), 0, param.numel(), FlatRange(0))
            flats.append(Flat(master, param.data.reshape(-1), (piece,), g, preloaded=True))
    return flats


def _check_tiling(flat: Flat) -> None:
    """Check that no two layers overlap, and none lies outside."""
    end = 0
    for piece in sorted((p for p in flat.slices if p.numel), key=lambda p: p.offset):
        if piece.offset < end or piece.offset + piece.numel > flat.low.numel():
            raise _moved(f"layer {piece.layer!r} overlaps another one or the end of its partition")
        end = piece.offset + piece.numel


def _check_values(flat: Flat) -> None:
    """Check that the master weights, rounded, are the model's working weights."""
    if flat.tensor.numel() == 0:  # on NVMe
        return
    for layer, part, low in _pieces(flat):
        if not torch.equal(part.to(low.device, low.dtype), low):
            raise _moved(
                f"layer {layer!r}: the optimizer's master weights are not those of the model (or weights "
                "were loaded into the model after deepspeed.initialize, which DeepSpeed would overwrite: "
                "load them before it)"
            )


def holds_exactly(flat: Flat) -> bool:
    """Whether `low` has every bit of the master's layers (padding is never written)."""
    return flat.tensor.numel() == 0 or all(
        torch.equal(part.to(low.device), low.to(part.dtype)) for _, part, low in _pieces(flat)
    )


def _pieces(flat: Flat) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Layer by layer, the same elements of the master and of `low`, in chunks of bounded size."""
    master = flat.tensor.detach().view(-1)
    for piece in flat.slices:
        end = piece.offset + piece.numel
        for begin in range(piece.offset, end, _CHUNK):
            cut = slice(begin, min(begin + _CHUNK, end))
            yield piece.layer, master[cut], flat.low[cut]


def _need(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        raise _moved(f"{owner.__class__.__name__} has no {name}")
    return getattr(owner, name)


def _name(param: Tensor, names: Mapping[Tensor, str]) -> str:
    if param not in names:
        raise _moved(f"a parameter of shape {tuple(param.shape)} is not among the model's")
    return names[param]


def _moved(what: str) -> UnsupportedError:
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("deepspeed")
    except PackageNotFoundError:
        installed = "of unknown version"
    return UnsupportedError(
        f"this DeepSpeed ({installed}) lays its optimizer out in a way that is not known: {what}; known are "
        f"versions {SUPPORTED}, right after deepspeed.initialize"
    )
