"""The engines of the matrix: how each wraps a model, runs backward, and gathers whole weights.

A new engine is one class and one line in `ENGINES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from tests.support.meshes import device_mesh, full_tensors
from tests.support.models import tensor_parallel


@dataclass
class Engine:
    """One process, nothing wrapped.

    `exact`: gradients arrive to the last bit as the loss asks for them; `needs_model`: AdamSPD has to be told
    the model. `dtype` is what the engine can train in, `clips` what it can clip the gradients of.
    """

    scratch: Path
    exact: bool = True
    dtype: torch.dtype = torch.float64
    clips: torch.dtype = torch.float64
    prefix: str = ""
    needs_model: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """This process among all."""
        return dist.get_rank()

    @property
    def world(self) -> int:
        """All processes."""
        return dist.get_world_size()

    @property
    def data_parallel(self) -> tuple[int, int]:
        """This rank's index and the number of ranks over which gradients are averaged."""
        return 0, 1

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as the engine runs it."""
        return model

    def named(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that the optimizer is to update, under the model's own names."""
        return {name.removeprefix(self.prefix): p for name, p in model.named_parameters()}

    def full(self, tensor: Tensor) -> Tensor:
        """The whole tensor, on every rank; collective."""
        tensor = tensor.detach()
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()

    def layers(self, name: str) -> tuple[str, ...]:
        """The layers in the parameter that `named` gives that name."""
        return (name,)

    def weights(self, params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """The whole layers, on every rank; collective."""
        return full_tensors(params)

    def gradients(self, params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """The whole gradients that the optimizer will see, where there are any; collective."""
        return full_tensors({name: p.grad for name, p in params.items() if p.grad is not None})

    def arrived(
        self, params: Mapping[str, nn.Parameter], given: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """The gradients that the optimizer sees of those that were given to the loss; collective."""
        return given

    def optimizer(
        self, model: nn.Module, make: Callable[..., Optimizer], groups: list[dict[str, Any]], **extra: Any
    ) -> tuple[Optimizer, nn.Module]:
        """What is stepped, and the model that is trained with it."""
        return make(groups, **extra), model

    def zero_grad(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Drop the gradients."""
        optimizer.zero_grad()

    def clip(self, model: nn.Module, params: Mapping[str, nn.Parameter], max_norm: float) -> float:
        """Clip by the norm of all gradients, which is returned; collective."""
        norm = nn.utils.clip_grad_norm_(params.values(), max_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state, on every rank; collective."""
        return optimizer.state_dict()

    def no_sync(self, model: nn.Module, skip: bool) -> None:
        """Whether the next backward only accumulates."""


@dataclass
class Ddp(Engine):
    """DistributedDataParallel; parameters that a step does not use keep no gradient."""

    prefix: str = "module."

    @property
    def data_parallel(self) -> tuple[int, int]:
        """Every rank sees its own data."""
        return self.rank, self.world

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wrapped whole."""
        return DistributedDataParallel(model, find_unused_parameters=True)

    def no_sync(self, model: nn.Module, skip: bool) -> None:
        """What `no_sync()` sets."""
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = not skip


@dataclass
class Fsdp2(Engine):
    """`fully_shard` of every block and of the root."""

    def mesh(self) -> DeviceMesh:
        """One axis over all ranks."""
        return device_mesh((self.world,), ("dp",))

    @property
    def data_parallel(self) -> tuple[int, int]:
        """Every rank sees its own data."""
        return self.rank, self.world

    def wrap(self, model: nn.Module) -> nn.Module:
        """Children with parameters of their own below are groups of their own."""
        mesh = self.mesh()
        for child in model.children():
            if sum(1 for _ in child.parameters()) > 1 and not self.options.get("ignored_params"):
                fully_shard(child, mesh=mesh, **self.options)
        return fully_shard(model, mesh=mesh, **self.options)

    def no_sync(self, model: nn.Module, skip: bool) -> None:
        """What gradient accumulation sets."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(not skip)


@dataclass
class Hsdp(Fsdp2):
    """Two replicas of a model that two ranks share."""

    def mesh(self) -> DeviceMesh:
        """Replicas x shards."""
        return device_mesh((2, self.world // 2), ("replicate", "shard"))


@dataclass
class Fsdp2Tp(Fsdp2):
    """`fully_shard` over a tensor-parallel model."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """Tensor parallelism first, as torch wants it."""
        mesh = device_mesh((self.world // 2, 2), ("dp", "tp"))
        tensor_parallel(model, mesh["tp"])
        for child in model.children():
            if sum(1 for _ in child.parameters()) > 1:
                fully_shard(child, mesh=mesh["dp"])
        return fully_shard(model, mesh=mesh["dp"])

    @property
    def data_parallel(self) -> tuple[int, int]:
        """Ranks of one tensor-parallel pair see the same data."""
        return self.rank // 2, self.world // 2


@dataclass
class HsdpTp(Fsdp2Tp):
    """Replicas of a model that is sharded and tensor-parallel: a mesh of three axes."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """Tensor parallelism first, as torch wants it."""
        names = ("replicate", "shard", "tp")
        mesh = device_mesh((2, self.world // 4, 2), names)
        tensor_parallel(model, mesh["tp"])
        for child in model.children():
            if sum(1 for _ in child.parameters()) > 1:
                fully_shard(child, mesh=mesh["replicate", "shard"])
        return fully_shard(model, mesh=mesh["replicate", "shard"])


@dataclass
class Experts(Fsdp2Tp):
    """Experts split over pairs of ranks and sharded over the pairs, all else sharded over all ranks."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """As mixtures of experts are parallelised: parameters of one model on different meshes."""
        mesh = device_mesh((self.world // 2, 2), ("efsdp", "ep"))
        everyone = device_mesh((self.world,), ("dp",))
        experts = model.get_submodule("block.mlp")
        for name, param in list(experts.named_parameters(recurse=False)):
            split = distribute_tensor(param.detach(), mesh["ep"], [Shard(0)], src_data_rank=None)
            experts.register_parameter(name, nn.Parameter(split, requires_grad=param.requires_grad))
        fully_shard(experts, mesh=mesh["efsdp"])
        fully_shard(model.get_submodule("block"), mesh=everyone)
        return fully_shard(model, mesh=everyone)


@dataclass
class Tp(Engine):
    """Tensor and sequence parallelism alone: norm gradients are Partial, some parameters plain tensors."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """Split over all ranks."""
        tensor_parallel(model, device_mesh((self.world,), ("tp",)))
        return model


def make_engine(name: str, scratch: Path) -> Engine:
    """The engine of that name; `scratch` is a folder that all ranks of a task share."""
    if name not in ENGINES:
        from tests.support.older_engines import OLDER

        return OLDER[name](scratch)
    return ENGINES[name](scratch)


def _offload(scratch: Path) -> Engine:
    return Fsdp2(scratch, options={"offload_policy": CPUOffloadPolicy(pin_memory=False)})


def _mixed(scratch: Path) -> Engine:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return Fsdp2(scratch, exact=False, options={"mp_policy": policy})


ENGINES = {
    "single": Engine,
    "ddp": Ddp,
    "fsdp2": Fsdp2,
    "hsdp": Hsdp,
    "fsdp2_tp": Fsdp2Tp,
    "fsdp2_odd": partial(Fsdp2, exact=False),  # what three ranks average is rounded
    "hsdp_tp": HsdpTp,
    "fsdp2_ep": Experts,
    "tp": Tp,
    "fsdp2_offload": _offload,
    "fsdp2_mixed": _mixed,
    "zero": Engine,  # tests.support.zero makes the DeepSpeed engine of each case
    "zero_autocast": Engine,  # the same, where DeepSpeed leaves its mark on the process
    "zero_kernels": Engine,  # the same, where DeepSpeed compiles its optimizer
}
