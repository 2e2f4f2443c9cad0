"""Engines of the job, by name: how a model is spread over the ranks, stepped, and gathered again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from sharded_spd.config.loading import build, choice
from sharded_spd.engines.dtensor import whole_slice
from sharded_spd.errors import ConfigError
from sharded_spd.finetune.config import NamedBlock, TrainConfig
from sharded_spd.finetune.engines.base import Engine
from sharded_spd.finetune.engines.blocks import DTYPES, Precision, blocks_of, need_ranks
from sharded_spd.finetune.engines.flat import FSDP1, FairscaleFSDP
from sharded_spd.finetune.engines.shares import FairscaleOSS, ZeroRedundancy
from sharded_spd.finetune.engines.zero import DeepSpeed
from sharded_spd.finetune.tasks.loading import Weights, places
from sharded_spd.finetune.world import World


@dataclass(frozen=True, kw_only=True)
class FSDP2Options:
    """Settings of `fully_shard`; `blocks` names the classes of the modules that are sharded one by one.

    `param_dtype`: of forward and backward, `train.precision` if null.
    """

    param_dtype: Precision | None = None
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

    def part(self, *, last: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged after the last part only."""
        no_sync = getattr(self.model, "no_sync", None)
        return nullcontext() if last or no_sync is None else no_sync()

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
        dtype = given.param_dtype or self.train.precision
        if (dtype, given.reduce_dtype) != ("float32", "float32"):
            settings["mp_policy"] = MixedPrecisionPolicy(DTYPES[dtype], DTYPES[given.reduce_dtype])
        if given.cpu_offload:
            settings["offload_policy"] = CPUOffloadPolicy(pin_memory=kind == "cuda")
        for block in blocks_of(model, given.blocks):
            fully_shard(block, **settings)
        fully_shard(model, **settings)  # in place
        if self.weights is not None:
            device = torch.device("cpu") if given.cpu_offload else self.world.device
            self.world.agree(partial(_fill, model, self.weights, device))
            model._apply(lambda tensor: tensor)  # FSDP looks at its parameters again
        return model

    @classmethod
    def loads_shards(cls, options: Any) -> bool:
        """Always."""
        return True

    def autocast(self) -> AbstractContextManager[Any]:
        """The mixed precision of FSDP itself."""
        return nullcontext()

    def clip(self, most: float) -> Any:
        """Of all shards together; offloaded ones are on the host, where a GPU's collectives do not reach."""
        gradients = [_local(p.grad) for p in self.model.parameters() if p.grad is not None]
        own = nn.utils.get_total_norm(gradients).double().square()
        norm = self.world.sum_(own.to(self.world.device)).sqrt()
        if most < math.inf and gradients:
            share = (most / (norm + 1e-6)).clamp(max=1.0).to(gradients[0].device)
            torch._foreach_mul_(gradients, share)
        return norm

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


@torch.no_grad()
def _fill(model: nn.Module, weights: Weights, device: torch.device) -> None:
    """Give every sharded parameter on the meta device this rank's values."""
    for parameter, where in places(model).items():
        sharded: Any = parameter
        fqn = where[0][2]
        piece = whole_slice(fqn, sharded)
        values = weights.read(fqn, tuple(sharded.shape), piece.region, piece.numel)
        local = values.view(sharded.to_local().shape).to(device)
        whole = DTensor.from_local(
            local,
            sharded.device_mesh,
            sharded.placements,
            run_check=False,
            shape=sharded.shape,
            stride=sharded.stride(),
        )
        filled = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        for module, name, _ in where:
            module._parameters[name] = filled


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


def engine_factory(
    block: NamedBlock, world: World, train: TrainConfig
) -> Callable[[nn.Module, Weights | None], Engine]:
    """What spreads a model as the block `engine` says, its name and options checked.

    Raises:
        ConfigError: an unknown engine (with the nearest name) or option.
    """
    options = check_engine(block)
    return lambda model, weights: ENGINES[block.name](model, options, world, train, weights)


def check_engine(block: NamedBlock, *, path: str = "engine") -> Any:
    """The options of an engine block.

    Raises:
        ConfigError: an unknown engine (with the nearest name) or option.
    """
    if block.name not in ENGINES:
        raise choice(path, block.name, list(ENGINES))
    return build(ENGINES[block.name].options, block.options, path)
