"""The job under optimizers that assign whole parameters to ranks: ZeroRedundancyOptimizer and OSS."""

from __future__ import annotations

import math
from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from sharded_spd.checkpoint.export import Whole, wholes
from sharded_spd.finetune.engines.base import Engine
from sharded_spd.finetune.engines.blocks import need_ranks
from sharded_spd.integrations.fairscale import import_fairscale


@dataclass(frozen=True, kw_only=True)
class OSSOptions:
    """`sharded_ddp`: gradients go only to the rank that steps them (fairscale's ShardedDataParallel)."""

    sharded_ddp: bool = False


class _Shares(Engine):
    """A copy of the model on every rank, optimizer state and anchors on one each."""

    shares_layers = True
    resumable = False
    name: ClassVar[str]

    @property
    def named_model(self) -> nn.Module:
        """The module inside the wrapper."""
        inner: nn.Module = getattr(self.model, "module", self.model)
        return inner

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model under `DistributedDataParallel`."""
        from torch.nn.parallel import DistributedDataParallel

        need_ranks(self.name)
        return DistributedDataParallel(model)

    def part(self, *, last: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged after the last part only."""
        no_sync = getattr(self.model, "no_sync", None)
        return nullcontext() if last or no_sync is None else no_sync()

    @abstractmethod
    def share_out(
        self, groups: list[dict[str, Any]], kind: type[torch.optim.Optimizer], **defaults: Any
    ) -> torch.optim.Optimizer:
        """The optimizer that divides the groups' parameters among ranks, each with its own inner `kind`."""

    def prepare(self, optimizer: torch.optim.Optimizer) -> Any:
        """Put the same optimizer on every rank's share of the parameters."""
        defaults = {key: optimizer.defaults[key] for key in ("lr", "betas", "eps", "weight_decay", "fused")}
        groups = [
            {key: value for key, value in group.items() if key != "param_names"}
            for group in optimizer.param_groups
        ]
        return self.share_out(groups, type(optimizer), **defaults)

    def wholes(self) -> list[Whole]:
        """Every rank has them."""
        return wholes(self.named_model)


class ZeroRedundancy(_Shares):
    """torch's own."""

    name = "zero-redundancy"

    def share_out(
        self, groups: list[dict[str, Any]], kind: type[torch.optim.Optimizer], **defaults: Any
    ) -> torch.optim.Optimizer:
        """`ZeroRedundancyOptimizer`."""
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(groups, kind, **defaults)


class FairscaleOSS(_Shares):
    """fairscale's, under torch's DistributedDataParallel or its own ShardedDataParallel."""

    name = "fairscale-oss"
    options = OSSOptions

    def wrap(self, model: nn.Module) -> nn.Module:
        """As torch's; ShardedDataParallel is made of the optimizer, in `prepare`."""
        import_fairscale()
        if not self.options_given.sharded_ddp:
            return super().wrap(model)
        need_ranks(self.name)
        return model

    def share_out(
        self, groups: list[dict[str, Any]], kind: type[torch.optim.Optimizer], **defaults: Any
    ) -> torch.optim.Optimizer:
        """`OSS`, and the wrapper that knows it."""
        fairscale = import_fairscale()
        whole: torch.optim.Optimizer = fairscale.optim.OSS(groups, kind, **defaults)
        if self.options_given.sharded_ddp:
            self.model = fairscale.nn.data_parallel.ShardedDataParallel(
                self.model, whole, warn_on_trainable_params_changed=False
            )
        return whole

    def step(self, optimizer: torch.optim.Optimizer, *, max_grad_norm: float | None) -> Any:
        """Clip, step and clear the gradients; the sharded wrapper leaves a rank those of its share only."""
        if not self.options_given.sharded_ddp:
            return super().step(optimizer, max_grad_norm=max_grad_norm)
        whole: Any = optimizer
        norm = whole.clip_grad_norm(math.inf if max_grad_norm is None else max_grad_norm)
        whole.step()
        self.model.zero_grad()  # in the wrapper's buffers, which the optimizer's would take them out of
        return norm
