"""fairscale: the flat parameters of its FullyShardedDataParallel, and a pitfall of its ShardedDataParallel.

Its OSS gives full parameters to an ordinary optimizer on each rank, see `partitioned`.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.nn import Module

from sharded_spd.engines.flat import FlatPiece, chunk, tile
from sharded_spd.engines.instances import instances_of

_FSDP = "fairscale.nn.data_parallel.fully_sharded_data_parallel"
_SDP = "fairscale.nn.data_parallel.sharded_ddp"


def fairscale_parts(model: Module) -> Iterator[tuple[Tensor, FlatPiece]]:
    """Each tensor that fairscale's FSDP gives the optimizer, with the wrappers' names of the layers."""
    for prefix, unit in _named_units(model):
        own_names = {param: name for name, param in unit.named_parameters()}
        for param in unit.params:
            yield param, _part(prefix, unit, param, own_names)


def fairscale_units(model: Module) -> list[Any]:
    """The wrappers in the model."""
    return [unit for _, unit in _named_units(model)]


def all_fairscale_units() -> list[Any]:
    """The wrappers of all models."""
    module = sys.modules.get(_FSDP)
    return [] if module is None else instances_of(module.FullyShardedDataParallel)


def _named_units(model: Module) -> Iterator[tuple[str, Any]]:
    module = sys.modules.get(_FSDP)
    if module is not None:
        for prefix, unit in model.named_modules():
            if isinstance(unit, module.FullyShardedDataParallel):
                yield prefix, unit


def _part(prefix: str, unit: Any, param: Any, own_names: dict[Tensor, str]) -> FlatPiece:
    if hasattr(param, "_param_infos"):  # several layers in one
        names = [".".join(filter(None, (prefix, path, name))) for path, _, name in param._param_infos]
        shapes = tuple(tuple(shape) for shape in param._param_shapes)
        numels = list(param._param_numels)
    else:
        names = [".".join(filter(None, (prefix, own_names[param])))]
        shapes, numels = (tuple(param._orig_size),), [param._orig_size.numel()]
    total, world = sum(numels), unit.world_size

    def shard() -> Tensor:
        # A layer without a gradient in the last backward is left gathered until the next forward.
        tensor: Tensor = getattr(param, "_fp32_shard", param)
        return tensor

    if not param._is_sharded:
        groups = (unit.process_group,) if world > 1 else ()
        return FlatPiece(tile(names, numels, (0, total)), shapes, total, (), groups, local=shard)
    group = (unit.process_group,)
    slices = tile(names, numels, chunk(total, unit.rank, world))
    return FlatPiece(slices, shapes, -(-total // world), group, group, local=shard)


def bucket_watch() -> BucketWatch | None:
    """A watch if fairscale is in use."""
    return BucketWatch() if "fairscale" in sys.modules else None


class BucketWatch:
    """Warns once if gradients lie outside the buffers in which ShardedDataParallel reduces them.

    `zero_grad(set_to_none=True)`, torch's default, takes them out, and the stale contents of the buffers are
    reduced: each rank then trains on its own gradients.
    """

    def __init__(self) -> None:
        self._wrappers: list[weakref.ref[Any]] | None = None

    def look(self, params: Iterable[Tensor]) -> None:
        """Look at the gradients of `params`, which are about to be used."""
        module = sys.modules.get(_SDP)
        if module is None:
            return
        if self._wrappers is None:
            # The wrapper holds the optimizer, which does not know it.
            self._wrappers = [weakref.ref(o) for o in instances_of(module.ShardedDataParallel)]
        live = [wrapper for ref in self._wrappers if (wrapper := ref()) is not None]
        if not live:
            return
        watched = set(params)
        for bucket in (bucket for wrapper in live for bucket in wrapper._bucket_list):
            buffer = bucket.buffer.untyped_storage().data_ptr()
            grads = [param.grad for param in watched.intersection(bucket._params) if param.grad is not None]
            if any(grad.untyped_storage().data_ptr() != buffer for grad in grads):
                self._wrappers = []
                warnings.warn(
                    "fairscale's ShardedDataParallel reduces gradients in buffers, and zero_grad("
                    "set_to_none=True), torch's default, took them out of these: they are not averaged over "
                    "the ranks. Call model.zero_grad() on the wrapper instead, or optimizer.zero_grad("
                    "set_to_none=False), or set reduce_buffer_size=0",
                    stacklevel=2,
                )
                return
