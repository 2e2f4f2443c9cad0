"""FSDP1, fairscale and ZeroRedundancyOptimizer, for the matrix.

Whole weights and gradients are put together from what lies on the ranks, one behind the other, and not by
the package's map.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from tests.support.engines import Ddp, Engine


@dataclass
class Flat(Engine):
    """An engine that lays parameters one behind the other and cuts that into chunks."""

    needs_model: bool = True
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    held: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def data_parallel(self) -> tuple[int, int]:
        return self.rank, self.world

    def unit(self, module: nn.Module) -> nn.Module:
        """The module wrapped."""
        raise NotImplementedError

    def wrap(self, model: nn.Module) -> nn.Module:
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        for name, child in list(model.named_children()):
            if sum(1 for _ in child.parameters()) > 1:
                setattr(model, name, self.unit(child))
        return self.unit(model)

    def layers(self, name: str) -> tuple[str, ...]:
        return self.held.get(name, (name,))

    def weights(self, params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        return dict(self._whole(params, {name: p.detach() for name, p in params.items()}))

    def gradients(self, params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        # A rank on which nothing of a layer lies has no gradient of it.
        return dict(self._whole(params, {n: p.grad if p.numel() else p.detach() for n, p in params.items()}))

    def pieces(self, name: str, param: Any) -> list[tuple[str | None, int]]:
        """The layers in a parameter with their sizes, in order; None is padding."""
        raise NotImplementedError

    def splits(self, params: Mapping[str, nn.Parameter]) -> Any:
        """The group whose ranks' parts make up the whole; None: each has it."""
        raise NotImplementedError

    def _whole(
        self, params: Mapping[str, nn.Parameter], local: dict[str, Tensor | None]
    ) -> Iterator[tuple[str, Tensor]]:
        # Cloned, for a view would take the whole of its buffer along.
        local = {name: None if part is None else part.clone() for name, part in local.items()}
        group, ranks = self.splits(params), [local]
        if group is not None:
            ranks = [{}] * dist.get_world_size(group)
            dist.all_gather_object(ranks, local, group=group)
        for name, param in params.items():
            parts = [part for part in (of_rank[name] for of_rank in ranks) if part is not None]
            if sum(part.numel() for part in parts) == 0:
                continue
            assert len(parts) == len(ranks), f"{name}: some ranks have no gradient"
            whole, begin = torch.cat([part.reshape(-1) for part in parts]), 0
            for layer, numel in self.pieces(name, param):
                if layer is not None:
                    yield layer, whole[begin : begin + numel].view(self.shapes[layer]).clone()
                begin += numel


@dataclass
class Fsdp1(Flat):
    """torch's FullyShardedDataParallel, around every block and the whole.

    An absent gradient arrives as zeros where another layer of its unit has one.
    """

    clips: torch.dtype = torch.float32
    orig: bool = True
    strategy: str = "FULL_SHARD"

    def unit(self, module: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

        settings = dict(self.options)
        if self.strategy == "HYBRID_SHARD":
            settings["device_mesh"] = init_device_mesh("cpu", (2, self.world // 2), mesh_dim_names=("r", "s"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NO_SHARD is deprecated
            return FullyShardedDataParallel(
                module,
                device_id=torch.device("cpu"),
                use_orig_params=self.orig,
                sharding_strategy=ShardingStrategy[self.strategy],
                **settings,
            )

    def named(self, model: nn.Module) -> dict[str, nn.Parameter]:
        self._handles: dict[str, Any] = {}
        found: dict[str, nn.Parameter] = {}
        for prefix, module in model.named_modules():
            handle = getattr(module, "_handle", None)
            if handle is None:
                continue
            flat = handle.flat_param
            names = [_clean(f"{prefix}.{fqn}") for fqn in flat._fqns]
            tensors = flat._params if self.orig else [flat]
            keys = names if self.orig else [_clean(f"{prefix}._flat_param")]
            found.update(zip(keys, tensors, strict=True))
            self._handles.update(dict.fromkeys(keys, handle))
            self.held.update({key: (key,) if self.orig else tuple(names) for key in keys})
        order = list(self.shapes)
        return dict(sorted(found.items(), key=lambda item: min(order.index(n) for n in self.held[item[0]])))

    def pieces(self, name: str, param: Any) -> list[tuple[str | None, int]]:
        if self.orig:
            return [(name, prod(self.shapes[name]))]
        flat, names = self._handles[name].flat_param, iter(self.held[name])
        sizes = zip(flat._numels_with_padding, flat._is_padding_mask, strict=True)
        return [(None if padding else next(names), numel) for numel, padding in sizes]

    def splits(self, params: Mapping[str, nn.Parameter]) -> Any:
        whole = self.strategy == "NO_SHARD" or self.world == 1
        return None if whole else self._handles[next(iter(params))].process_group

    def arrived(
        self, params: Mapping[str, nn.Parameter], given: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        return self.gradients(params)

    def clip(self, model: nn.Module, params: Mapping[str, nn.Parameter], max_norm: float) -> float:
        return float(model.clip_grad_norm_(max_norm))  # type: ignore[operator]

    def no_sync(self, model: nn.Module, skip: bool) -> None:
        for module in model.modules():
            if hasattr(module, "_sync_gradients"):
                module._sync_gradients = not skip


@dataclass
class FairscaleFsdp(Flat):
    """fairscale's, which takes float32 only."""

    dtype: torch.dtype = torch.float32
    clips: torch.dtype = torch.float32
    flatten: bool = True

    def unit(self, module: nn.Module) -> nn.Module:
        from tests.support.fairscale_shim import install

        install()
        from fairscale.nn.data_parallel import FullyShardedDataParallel

        return FullyShardedDataParallel(
            module, flatten_parameters=self.flatten, compute_device=torch.device("cpu"), **self.options
        )

    def arrived(
        self, params: Mapping[str, nn.Parameter], given: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        return self.gradients(params)

    def named(self, model: nn.Module) -> dict[str, nn.Parameter]:
        found = {}
        for name, p in model.named_parameters():
            key = _clean(name)
            found[key] = p
            if self.flatten:
                path = key.rpartition(".")[0]
                inside = [".".join(filter(None, (path, _clean(m), n))) for m, _, n in p._param_infos]  # type: ignore[attr-defined]
                self.held[key] = tuple(inside)
        return found

    def pieces(self, name: str, param: Any) -> list[tuple[str | None, int]]:
        return [(layer, prod(self.shapes[layer])) for layer in self.layers(name)]

    def splits(self, params: Mapping[str, nn.Parameter]) -> Any:
        return dist.group.WORLD if self.world > 1 else None

    def clip(self, model: nn.Module, params: Mapping[str, nn.Parameter], max_norm: float) -> float:
        return float(model.clip_grad_norm_(max_norm))  # type: ignore[operator]

    def no_sync(self, model: nn.Module, skip: bool) -> None:
        for module in model.modules():
            if hasattr(module, "_require_backward_grad_sync"):
                module._require_backward_grad_sync = not skip


def _clean(name: str) -> str:
    wrappers = ("_fsdp_wrapped_module", "_fpw_module", "")
    return ".".join(part for part in name.split(".") if part not in wrappers)


@dataclass
class ZeroRedundancy(Ddp):
    """torch's: whole parameters, each stepped by one rank. It takes no named parameters."""

    needs_model: bool = True

    def optimizer(
        self, model: nn.Module, make: Callable[..., Optimizer], groups: list[dict[str, Any]], **extra: Any
    ) -> tuple[Optimizer, nn.Module]:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(_unnamed(groups), optimizer_class=make, **extra), model

    def state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for rank in range(self.world):
            optimizer.consolidate_state_dict(to=rank)  # type: ignore[attr-defined]
            if rank == self.rank:  # the next consolidation drops it
                state = optimizer.state_dict()
        return state


def _unnamed(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**group, "params": [p if isinstance(p, Tensor) else p[1] for p in group["params"]]}
        for group in groups
    ]


@dataclass
class Oss(Ddp):
    """fairscale's OSS under torch's DDP."""

    needs_model: bool = True

    def optimizer(
        self, model: nn.Module, make: Callable[..., Optimizer], groups: list[dict[str, Any]], **extra: Any
    ) -> tuple[Optimizer, nn.Module]:
        from fairscale.optim import OSS

        return OSS(_unnamed(groups), optim=make, **extra), model

    def state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        optimizer.consolidate_state_dict(recipient_rank=-1)  # type: ignore[attr-defined]
        return optimizer.state_dict()


@dataclass
class OssSharded(Oss):
    """OSS under fairscale's ShardedDataParallel, which is made of the optimizer.

    An absent gradient is the zeros of its buffer. Other ranks' gradients are garbage after the reduction.
    """

    prefix: str = ""

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def optimizer(
        self, model: nn.Module, make: Callable[..., Optimizer], groups: list[dict[str, Any]], **extra: Any
    ) -> tuple[Optimizer, nn.Module]:
        from fairscale.nn.data_parallel import ShardedDataParallel

        optimizer, model = super().optimizer(model, make, groups, **extra)
        self._oss: Any = optimizer
        return optimizer, ShardedDataParallel(model, optimizer, **self.options)

    def zero_grad(self, model: nn.Module, optimizer: Optimizer) -> None:
        model.zero_grad()  # not the optimizer's, which takes the gradients out of the wrapper's buffers

    def arrived(
        self, params: Mapping[str, nn.Parameter], given: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        return {n: given.get(n, torch.zeros_like(p)) for n, p in params.items() if p.requires_grad}

    def gradients(self, params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for n, p in params.items():
            if p.grad is not None:
                found[n] = p.grad.clone()
                dist.broadcast(found[n], src=self.owner(p))
        return found

    def owner(self, param: nn.Parameter) -> int:
        """The rank that steps it."""
        return self._oss._param_to_rank[param]

    def no_sync(self, model: nn.Module, skip: bool) -> None:
        model._should_accumulate_grads = skip  # type: ignore[assignment]


def _mixed(scratch: Path, *, orig: bool) -> Engine:
    from torch.distributed.fsdp import MixedPrecision

    policy = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return Fsdp1(scratch, exact=False, orig=orig, options={"mixed_precision": policy})


OLDER: dict[str, Callable[[Path], Engine]] = {
    "fsdp1": Fsdp1,
    "fsdp1_flat": partial(Fsdp1, orig=False),
    "fsdp1_odd": partial(Fsdp1, exact=False),  # what three ranks average is rounded
    "fsdp1_flat_odd": partial(Fsdp1, exact=False, orig=False),
    "fsdp1_grad_op": partial(Fsdp1, strategy="SHARD_GRAD_OP"),
    "fsdp1_flat_grad_op": partial(Fsdp1, orig=False, strategy="SHARD_GRAD_OP"),
    "fsdp1_hybrid": partial(Fsdp1, strategy="HYBRID_SHARD"),
    "fsdp1_flat_hybrid": partial(Fsdp1, orig=False, strategy="HYBRID_SHARD"),
    "fsdp1_no_shard": partial(Fsdp1, strategy="NO_SHARD"),
    "fsdp1_flat_no_shard": partial(Fsdp1, orig=False, strategy="NO_SHARD"),
    "fsdp1_mixed": partial(_mixed, orig=True),
    "fsdp1_flat_mixed": partial(_mixed, orig=False),
    "fairscale_fsdp": FairscaleFsdp,
    "fairscale_fsdp_plain": partial(FairscaleFsdp, flatten=False),
    "zero_redundancy": ZeroRedundancy,
    "oss": Oss,
    "oss_sharded": OssSharded,
}
