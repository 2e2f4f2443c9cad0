"""The scalars of the param groups as vectors over a plan's layers, uploaded only when they change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from sharded_spd.binding.records import Binding
from sharded_spd.errors import ConfigError, UnsupportedError
from sharded_spd.sharding.layout import BoundShard


class HostVector:
    """A vector on `device` made of host numbers and 0-d device tensors; float64 unless said otherwise."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float64) -> None:
        self._device = device
        self._host: list[Any] = []
        self._vector = torch.empty(0, dtype=dtype, device=device)

    def update(self, values: Sequence[float | Tensor]) -> Tensor:
        """The vector of `values`, `[len(values)]`; no upload if they equal the last ones."""
        on_device = {i: v for i, v in enumerate(values) if isinstance(v, Tensor) and v.device.type != "cpu"}
        vector = self.update_numbers([0.0 if i in on_device else float(v) for i, v in enumerate(values)])
        if not on_device:
            return vector
        vector = vector.clone()
        for i, value in on_device.items():
            vector[i] = value.to(device=self._device, dtype=vector.dtype)
        return vector

    def update_numbers(self, numbers: list[Any]) -> Tensor:
        """The same, for host numbers only."""
        if numbers != self._host:
            self._host = numbers
            upload = torch.tensor(numbers, dtype=self._vector.dtype, pin_memory=self._device.type == "cuda")
            self._vector = upload.to(self._device, non_blocking=True)
        return self._vector


class StepScalars(NamedTuple):
    """The scalars of one step, float64 `[num_layers]` each; `moves`: whether it moves any layer.

    `moves` is as far as the host can tell: with a gradient and a learning rate.
    """

    lr: Tensor
    weight_decay: Tensor
    max_pull: Tensor
    has_grad: Tensor
    moves: bool


class Hyperparams:
    """Each layer's lr, lambda and pull limit, and whether it has a gradient.

    Layers with the same param group and settings share their scalars: each is read once.

    Args:
        column: each layer's column in the plan.
        scopes: the layers of each scope of the plan.
        device: the plan's device.
        binding: the layers' settings.
        shards: the shards that one call of the optimizer steps.
    """

    def __init__(
        self,
        column: Mapping[str, int],
        scopes: Sequence[Sequence[str]],
        device: torch.device,
        binding: Binding,
        shards: Sequence[BoundShard],
    ) -> None:
        kinds: dict[tuple[int, float | None, float | None], int] = {}
        self._kinds: list[tuple[Any, float | None, float | None, str]] = []
        kind_of, shard_of = [0] * len(column), [0] * len(column)
        decays = [False] * len(column)
        for position, shard in enumerate(shards):
            for piece in shard.slices:
                settings, at = binding.options[piece.layer], column[piece.layer]
                key = (id(shard.param_group), settings.weight_decay, settings.max_pull)
                if key not in kinds:
                    kinds[key] = len(kinds)
                    scalars = (settings.weight_decay, settings.max_pull, piece.layer)
                    self._kinds.append((shard.param_group, *scalars))
                kind_of[at], shard_of[at], decays[at] = kinds[key], position, settings.rule.spec.decays
        # What must agree between the ranks of a scope: its layers' kinds, without consecutive repeats.
        self._kinds_of_scopes = [
            [kind for kind, _ in groupby(kind_of[column[fqn]] for fqn in fqns)] for fqns in scopes
        ]
        self._last: list[Any] = []
        self.checksums: list[int] = [0] * len(scopes)
        """Checksums of the scalars read last, one per scope of the plan."""
        self.has_strength: list[bool] = []
        """Whether each layer may be pulled now, as far as the host can tell: lambda is not the number 0."""
        self._kinds_of_layers, self._decays = kind_of, decays
        self._kind_of = torch.tensor(kind_of, dtype=torch.long, device=device)
        self._shard_of = torch.tensor(shard_of, dtype=torch.long, device=device)
        self._vectors = [HostVector(device) for _ in range(3)]
        self._has_grad, self._has_state = HostVector(device), HostVector(device)

    def read(self, shards: Sequence[BoundShard]) -> StepScalars:
        """Read the current scalars of the param groups.

        Raises:
            ConfigError: for one out of range; names a layer that has it.
        """
        values: list[tuple[Any, Any, Any]] = []
        for group, weight_decay, max_pull, layer in self._kinds:
            decay = group["weight_decay"] if weight_decay is None else weight_decay
            pull = group.get("max_pull") if max_pull is None else max_pull
            limit = float("inf") if pull is None else pull
            _check(layer, group.get("lr"), decay, limit)
            values.append((group["lr"], decay, limit))
        columns = list(zip(*values, strict=True)) if values else [()] * 3
        self._sum_up([tuple(map(_told, scalars)) for scalars in values])
        lr, decay, limit = (v.update(c)[self._kind_of] for v, c in zip(self._vectors, columns, strict=True))
        with_grad = [shard.grad is not None for shard in shards]
        groups = {id(s.param_group): s.param_group for s, has in zip(shards, with_grad, strict=True) if has}
        moves = any(isinstance(g["lr"], Tensor) or g["lr"] != 0 for g in groups.values())
        has_grad = self._has_grad.update_numbers(with_grad)[self._shard_of]
        strong = [isinstance(decay, Tensor) or decay != 0 for _, decay, _ in values]
        pairs = zip(self._kinds_of_layers, self._decays, strict=True)
        self.has_strength = [decays or strong[kind] for kind, decays in pairs]
        return StepScalars(lr, decay, limit, has_grad, moves)

    def _sum_up(self, values: list[Any]) -> None:
        if values != self._last:
            self._last = values
            self.checksums = [
                crc32(repr([values[kind] for kind in kinds]).encode()) for kinds in self._kinds_of_scopes
            ]

    def settings(self) -> dict[str, Any]:
        """The scalars read last, keyed by the first layer that has them; for error messages."""
        return {
            f"{name} of {layer!r}": value
            for (*_, layer), scalars in zip(self._kinds, self._last, strict=False)
            for name, value in zip(("lr", "weight_decay", "max_pull"), scalars, strict=True)
        }

    def has_state(self, shards: Sequence[BoundShard]) -> Tensor:
        """1 for the layers that the base optimizer has stepped before, float64 `[num_layers]`."""
        return self._has_state.update_numbers([shard.has_state for shard in shards])[self._shard_of]


def _told(value: Any) -> float | None:
    """A scalar as ranks compare it; None if the host would have to wait for it."""
    return None if isinstance(value, Tensor) and value.device.type != "cpu" else float(value)


def _check(fqn: str, lr: Any, weight_decay: Any, max_pull: Any) -> None:
    """Check the scalars of one layer for a step.

    Raises:
        UnsupportedError: its param group has no learning rate.
        ConfigError: for a strength or a limit out of range.
    """
    if lr is None:
        raise UnsupportedError(
            f"layer {fqn!r}: its param group has no 'lr'; wanted a learning rate: give the base optimizer "
            "one (for Adafactor: relative_step=False)"
        )
    if not isinstance(weight_decay, Tensor) and not weight_decay >= 0:
        raise ConfigError(f"layer {fqn!r}: got weight_decay {weight_decay}; wanted lambda >= 0")
    if not isinstance(max_pull, Tensor) and not max_pull > 0:
        raise ConfigError(
            f"layer {fqn!r}: got max_pull {max_pull}; wanted a number > 0, or None for no limit"
        )
