"""Engines of the job, by name: how a model is spread over the ranks, stepped, and gathered again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from sharded_spd.errors import ConfigError
from sharded_spd.integrations.finetune.blocks import DTYPES, Precision, blocks_of, need_ranks
from sharded_spd.integrations.finetune.config import NamedBlock
from sharded_spd.integrations.finetune.engine_base import Engine
from sharded_spd.integrations.finetune.flat import FSDP1, FairscaleFSDP
from sharded_spd.integrations.finetune.shares import FairscaleOSS, ZeroRedundancy
from sharded_spd.integrations.finetune.strict import build, choice
from sharded_spd.integrations.finetune.world import World
from sharded_spd.integrations.finetune.zero import DeepSpeed


@dataclass(frozen=True, kw_only=True)
class FSDP2Options:
    """Settings of `fully_shard`; `blocks` names the classes of the modules that are sharded one by one."""

    param_dtype: Precision = "float32"
    reduce_dtype: Precision = "float32"
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    blocks: tuple[str, ...] = ()


class Single(Engine):
    """The whole model in one process."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model itself."""
        if self.world.size > 1:
            raise ConfigError(
                f"engine: single runs one rank, got {self.world.size}; take ddp or fsdp2, or set ranks: 1"
            )
        return model


class DDP(Engine):
    """A whole copy of the model on every rank."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model under `DistributedDataParallel`."""
        if self.world.size == 1 and not torch.distributed.is_initialized():
            return model  # nothing to average with
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model)

    @property
    def named_model(self) -> nn.Module:
        """The module inside the wrapper."""
        inner: nn.Module = getattr(self.model, "module", self.model)
        return inner


class FSDP2(Engine):
    """Parameters, gradients and optimizer state split over the ranks by `fully_shard`."""

    options = FSDP2Options

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with its blocks and its root sharded."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        given: FSDP2Options = self.options_given
        kind = self.world.device.type
        need_ranks("fsdp2")
        mesh = init_device_mesh(kind, (self.world.size,))
        settings: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": given.reshard_after_forward}
        if (given.param_dtype, given.reduce_dtype) != ("float32", "float32"):
            settings["mp_policy"] = MixedPrecisionPolicy(
                DTYPES[given.param_dtype], DTYPES[given.reduce_dtype]
            )
        if given.cpu_offload:
            settings["offload_policy"] = CPUOffloadPolicy(pin_memory=kind == "cuda")
        for block in blocks_of(model, given.blocks):
            fully_shard(block, **settings)
        fully_shard(model, **settings)  # in place
        return model

    def after_evaluation(self) -> None:
        """Reshard: a forward without a backward leaves the root whole."""
        from torch.distributed.fsdp import FSDPModule

        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def local_tensors(self) -> dict[str, torch.Tensor]:
        """This rank's shard of each parameter."""
        self.after_evaluation()
        with torch.no_grad():
            return {name: _local(p) for name, p in self.model.named_parameters()}

    def sum_over_shards(self, values: torch.Tensor) -> torch.Tensor:
        """Summed over all ranks: each holds another part."""
        return self.world.sum_(values)


def _local(parameter: Any) -> Any:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


ENGINES: Mapping[str, type[Engine]] = {
    "single": Single,
    "ddp": DDP,
    "fsdp2": FSDP2,
    "deepspeed": DeepSpeed,
    "fsdp1": FSDP1,
    "fairscale-fsdp": FairscaleFSDP,
    "fairscale-oss": FairscaleOSS,
    "zero-redundancy": ZeroRedundancy,
}


def engine_factory(block: NamedBlock, world: World) -> Callable[[nn.Module], Engine]:
    """What spreads a model as the block `engine` says, its name and options checked.

    Raises:
        ConfigError: an unknown engine (with the nearest name) or option.
    """
    options = check_engine(block)
    return lambda model: ENGINES[block.name](model, options, world)


def check_engine(block: NamedBlock, *, path: str = "engine") -> Any:
    """The options of an engine block.

    Raises:
        ConfigError: an unknown engine (with the nearest name) or option.
    """
    if block.name not in ENGINES:
        raise choice(path, block.name, list(ENGINES))
    return build(ENGINES[block.name].options, block.options, path)
