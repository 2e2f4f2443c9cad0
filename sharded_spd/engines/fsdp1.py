"""FullyShardedDataParallel of torch (FSDP1): a unit's parameters in one flat tensor, cut into equal chunks.

With `use_orig_params` the optimizer has one slice of it per original parameter, empty if this rank owns
none of it; without, the flat tensor itself.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module

from sharded_spd.engines.flat import FlatPiece, chunk, tile
from sharded_spd.engines.instances import instances_of
from sharded_spd.errors import UnsupportedError
from sharded_spd.sharding.layout import FlatRange, ShardSlice

_FSDP = "torch.distributed.fsdp.fully_sharded_data_parallel"


def fsdp1_parts(model: Module) -> Iterator[tuple[Tensor, FlatPiece]]:
    """Each tensor that FSDP1 gives the optimizer, with the wrappers' names of the layers.

    Raises:
        UnsupportedError: a layer is not flattened row by row, or is tensor-parallel, or this torch lays out
            flat parameters in another way.
    """
    for prefix, unit in _named_units(model):
        if unit._handle is not None:
            yield from _unit_parts(prefix, unit, unit._handle)


def fsdp1_units(model: Module) -> list[Any]:
    """The wrappers in the model."""
    return [unit for _, unit in _named_units(model)]


def all_fsdp1_units() -> list[Any]:
    """The wrappers of all models."""
    module = sys.modules.get(_FSDP)
    return [] if module is None else instances_of(module.FullyShardedDataParallel)


def _named_units(model: Module) -> Iterator[tuple[str, Any]]:
    module = sys.modules.get(_FSDP)
    if module is not None:
        for prefix, unit in model.named_modules():
            if isinstance(unit, module.FullyShardedDataParallel):
                yield prefix, unit


def fsdp1_ties(model: Module) -> Iterator[tuple[str, str]]:
    """The name that each shared parameter has in `fsdp1_parts`, and each of its others."""
    for prefix, unit in _named_units(model):
        if unit._handle is not None:
            for name, _, path, first_name, _, first_path in unit._handle.flat_param._shared_param_infos:
                first = ".".join(filter(None, (prefix, first_path, first_name)))
                yield first, ".".join(filter(None, (prefix, path, name)))


def _unit_parts(prefix: str, unit: Any, handle: Any) -> Iterator[tuple[Tensor, FlatPiece]]:
    flat = handle.flat_param
    names = tuple(f"{prefix}.{fqn}" if prefix else fqn for fqn in flat._fqns)
    shapes = tuple(tuple(shape) for shape in flat._shapes)
    _check_layers(flat, names, shapes)
    total, sharded = sum(flat._numels_with_padding), handle.uses_sharded_strategy
    window = chunk(total, handle.rank, handle.world_size) if sharded else (0, total)
    rest = iter(names)
    padded = [None if padding else next(rest) for padding in flat._is_padding_mask]
    slices = tile(padded, flat._numels_with_padding, window)
    _check_map(flat, slices)
    split, groups = _groups(unit, handle)
    if flat._params is None:
        numel = -(-total // handle.world_size) if sharded else total
        yield flat, FlatPiece(slices, shapes, numel, split, groups)
        return
    if handle.device.type == "cpu":
        warnings.warn(
            "FSDP1 on CPU with use_orig_params=True: torch mixes up the optimizer's states when it gathers "
            "full ones (FULL_STATE_DICT), whatever the optimizer; save sharded ones",
            stacklevel=2,
        )
    for param, piece, shape in zip(flat._params, slices, shapes, strict=True):
        slice_ = ShardSlice(piece.layer, 0, piece.numel, piece.region)
        yield param, FlatPiece((slice_,), (shape,), piece.numel, split, groups, flat=sharded)


def _groups(unit: Any, handle: Any) -> tuple[tuple[ProcessGroup, ...], tuple[ProcessGroup, ...]]:
    """The group that splits the layers, if any; and that group with the replicas' group."""
    between = getattr(unit, "_inter_node_pg", None)
    both = tuple(g for g in (handle.process_group, between) if g is not None and g.size() > 1)
    return (both[:1] if handle.uses_sharded_strategy else ()), both


def _check_layers(flat: Any, names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> None:
    for name, shape, stride, extension in zip(
        names, shapes, flat._strides, flat._param_extensions, strict=True
    ):
        if extension is not None:
            raise UnsupportedError(
                f"layer {name!r} is tensor-parallel under FSDP1; wanted fully_shard (FSDP2), which tells how "
                "such a layer is split"
            )
        if not torch.empty_strided(shape, stride, device="meta").is_contiguous():
            raise UnsupportedError(
                f"layer {name!r} has strides {tuple(stride)} (channels_last?), and FSDP1 flattened it in "
                "that order; wanted row by row: give FSDP1 the model in torch.contiguous_format"
            )


def _check_map(flat: Any, slices: tuple[ShardSlice, ...]) -> None:
    """Check the computed slices against those that FSDP1 itself uses."""
    for piece, info in zip(slices, flat._shard_param_infos, strict=True):
        actual = ShardSlice(piece.layer, 0, 0, FlatRange(0))
        if info.in_shard:
            region = FlatRange(info.intra_param_start_idx)
            actual = ShardSlice(piece.layer, info.offset_in_shard, info.numel_in_shard, region)
        if actual != piece:
            raise UnsupportedError(
                f"layer {piece.layer!r} lies at {actual} of FSDP1's flat parameter, wanted {piece}: torch "
                f"{torch.__version__} lays it out in a way that is not known (2.13 is)"
            )
