"""The job's interface to an engine: one model under it, wrapped, trained and gathered."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from sharded_spd.checkpoint.export import Whole, wholes
from sharded_spd.errors import ConfigError
from sharded_spd.finetune.config import TrainConfig
from sharded_spd.finetune.engines.blocks import DTYPES, blocks_of
from sharded_spd.finetune.tasks.loading import Weights
from sharded_spd.finetune.world import World


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """An engine without settings of its own."""


class Engine(ABC):
    """One model under one engine: wrap it, train it, gather it.

    `shares_layers`: a rank projects some of the layers only, and its telemetry is of those. `resumable`: its
    model and optimizer have sharded checkpoints; `in_background`: which can be written while it trains.
    `weights`: where the values of a model without any come from.
    """

    options: ClassVar[type[Any]] = NoOptions
    shares_layers: ClassVar[bool] = False
    resumable: ClassVar[bool] = True
    in_background: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        options: Any,
        world: World,
        train: TrainConfig,
        weights: Weights | None = None,
    ) -> None:
        self.options_given, self.world, self.train = options, world, train
        self.weights = weights
        self._tune(model)
        if weights is None:
            model = model.to(world.device)
        else:
            for module in model.modules():
                for name, buffer in module._buffers.items():
                    module._buffers[name] = None if buffer is None else buffer.to(world.device)
        self.model = self.wrap(model)

    def _tune(self, model: nn.Module) -> None:
        if self.train.activation_checkpointing:
            enable = getattr(model, "gradient_checkpointing_enable", None)
            try:
                if enable is None:
                    raise ValueError("it has no such method")
                enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            except ValueError as error:
                raise ConfigError(
                    f"train.activation_checkpointing: {type(model).__name__} does not support it: {error}"
                ) from None
        if self.train.compile:
            for block in blocks_of(model, ()) or [model]:
                block.compile()

    @classmethod
    def check(cls, options: Any, train: TrainConfig) -> None:
        """Find incompatible settings before anything is started."""
        return

    @classmethod
    def loads_shards(cls, options: Any) -> bool:
        """Whether `wrap` takes a model without values and reads each rank's shards from `weights`."""
        return False

    @classmethod
    def may_freeze(cls, options: Any) -> bool:
        """Whether frozen and trained layers may be mixed."""
        return True

    def part(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a part of a step; only the `last` one's gradients need be final."""
        return nullcontext()

    def autocast(self) -> AbstractContextManager[Any]:
        """Around a forward: lower precision, where the engine does not bring its own."""
        if self.train.precision == "float32":
            return nullcontext()
        return torch.autocast(self.world.device.type, DTYPES[self.train.precision])

    @property
    def named_model(self) -> nn.Module:
        """The module whose parameter names are the checkpoint's own."""
        return self.model

    @abstractmethod
    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as this engine trains it, collective."""

    def prepare(self, optimizer: torch.optim.Optimizer) -> Any:
        """Take over the optimizer, collective; return the object that a rule attaches to.

        If that is an optimizer, it is the one stepped from then on.
        """
        return optimizer

    def backward(self, loss: torch.Tensor, *, last: bool = True) -> None:
        """Compute the gradients of `loss`; after the `last` part of a step average them over the ranks."""
        loss.backward()

    def step(self, optimizer: torch.optim.Optimizer, *, max_grad_norm: float | None) -> Any:
        """Clip, step and clear the gradients; return their norm before clipping, a number or a 0-d tensor.

        Collective if a rank has only a part of the gradients.
        """
        norm = self.clip(math.inf if max_grad_norm is None else max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def clip(self, most: float) -> Any:
        """Clip the gradients to the norm `most`, and return what it was. Collective as in `step`."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if most < math.inf:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), most, norm)
        return norm

    def after_evaluation(self) -> None:
        """Put the parameters back as training wants them after a forward without gradients."""
        return

    def wholes(self) -> list[Whole]:
        """Every tensor of the model that is saved, to be gathered one by one. Collective."""
        return wholes(self.model)

    def squared_distances(self, start: Mapping[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
        """|w - start|^2 and |start|^2 of each layer in `start`, from `local_copy`. Collective.

        A layer is whatever the engine has as one parameter: a flat one where it makes one of many.
        """
        sums = torch.zeros(len(start), 2, dtype=torch.float64, device=self.world.device)
        for own, (name, tensor) in zip(sums, self._trained(), strict=True):
            before = start[name].double()
            # Offloaded shards are on the host.
            own[0] = (tensor.double() - before).square().sum().to(sums.device)
            own[1] = before.square().sum().to(sums.device)
        found = self.sum_over_shards(sums).tolist()
        return {name: (distance, size) for name, (distance, size) in zip(start, found, strict=True)}

    def local_copy(self) -> dict[str, torch.Tensor]:
        """A copy of what this rank holds of each parameter that is trained."""
        return {name: tensor.clone() for name, tensor in self._trained()}

    def _trained(self) -> Iterator[tuple[str, torch.Tensor]]:
        held = self.local_tensors()
        return ((name, held[name]) for name, p in self.named_model.named_parameters() if p.requires_grad)

    def local_tensors(self) -> dict[str, torch.Tensor]:
        """What this rank holds of each parameter."""
        return {name: p.detach() for name, p in self.named_model.named_parameters()}

    def sum_over_shards(self, values: torch.Tensor) -> torch.Tensor:
        """Add up what the ranks hold of one copy of the model (modified in place)."""
        return values
