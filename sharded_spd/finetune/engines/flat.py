"""The job under the wrappers that flatten parameters: torch's FSDP1 and fairscale's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from sharded_spd.checkpoint.export import Whole, at_hand
from sharded_spd.finetune.engines.base import Engine
from sharded_spd.finetune.engines.blocks import DTYPES, Precision, need_ranks, wrap_blocks
from sharded_spd.integrations.fairscale import import_fairscale


@dataclass(frozen=True, kw_only=True)
class FSDP1Options:
    """Settings of `FullyShardedDataParallel`; `blocks` names the classes that are wrapped one by one."""

    sharding_strategy: Literal["full_shard", "shard_grad_op", "no_shard"] = "full_shard"
    use_orig_params: bool = True
    param_dtype: Precision | None = None
    reduce_dtype: Precision = "float32"
    cpu_offload: bool = False
    blocks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FairscaleFSDPOptions:
    """Settings of fairscale's `FullyShardedDataParallel`, which needs a GPU."""

    reshard_after_forward: bool = True
    flatten_parameters: bool = True
    mixed_precision: bool = False
    blocks: tuple[str, ...] = ()


class _Flat(Engine):
    """The base of both: every rank holds a part of each flat tensor, and the wrapper clips."""

    def clip(self, most: float) -> Any:
        """The wrapper's own, over all ranks; to infinity it changes nothing. Collective."""
        wrapper: Any = self.model
        return wrapper.clip_grad_norm_(most)

    def autocast(self) -> AbstractContextManager[Any]:
        """The mixed precision of the wrapper itself."""
        return nullcontext()


class FSDP1(_Flat):
    """Parameters, gradients, optimizer state and anchor split over the ranks by torch's first FSDP."""

    options = FSDP1Options

    @classmethod
    def may_freeze(cls, options: FSDP1Options) -> bool:
        """Not within one flat parameter."""
        return options.use_orig_params

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with its blocks and its root wrapped."""
        from torch.distributed.fsdp import (
            CPUOffload,
            FullyShardedDataParallel,
            MixedPrecision,
            ShardingStrategy,
        )

        need_ranks("fsdp1")
        given: FSDP1Options = self.options_given
        precision = None
        dtype = given.param_dtype or self.train.precision
        if (dtype, given.reduce_dtype) != ("float32", "float32"):
            precision = MixedPrecision(DTYPES[dtype], DTYPES[given.reduce_dtype])

        def shard(module: nn.Module) -> nn.Module:
            return FullyShardedDataParallel(
                module,
                sharding_strategy=ShardingStrategy[given.sharding_strategy.upper()],
                use_orig_params=given.use_orig_params,
                mixed_precision=precision,
                cpu_offload=CPUOffload(offload_params=given.cpu_offload),
                device_id=self.world.device,
            )

        return wrap_blocks(model, given.blocks, shard)

    def sum_over_shards(self, values: torch.Tensor) -> torch.Tensor:
        """Summed over all ranks if each holds another part."""
        return values if self.options_given.sharding_strategy == "no_shard" else self.world.sum_(values)


class FairscaleFSDP(_Flat):
    """The same by fairscale's FSDP."""

    options = FairscaleFSDPOptions
    resumable = False

    @classmethod
    def may_freeze(cls, options: FairscaleFSDPOptions) -> bool:
        """Not within one flat parameter."""
        return not options.flatten_parameters

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with its blocks and its root wrapped."""
        need_ranks("fairscale-fsdp")
        kind = import_fairscale().nn.data_parallel.FullyShardedDataParallel
        given: FairscaleFSDPOptions = self.options_given

        def shard(module: nn.Module) -> nn.Module:
            wrapped: nn.Module = kind(
                module,
                reshard_after_forward=given.reshard_after_forward,
                flatten_parameters=given.flatten_parameters,
                mixed_precision=given.mixed_precision or self.train.precision != "float32",
                compute_device=self.world.device,
            )
            return wrapped

        return wrap_blocks(model, given.blocks, shard)

    def wholes(self) -> list[Whole]:
        """fairscale gathers them all at once, for the main rank's CPU."""
        state = self.model.state_dict()  # collective
        if not self.world.main:
            return []
        return [at_hand(name, tensor) for name, tensor in state.items()]

    def sum_over_shards(self, values: torch.Tensor) -> torch.Tensor:
        """Summed over all ranks: each holds another part."""
        return self.world.sum_(values)
