"""The scalars of the param groups as vectors over a plan's layers, uploaded only when they change."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from sharded_spd.binding.records import Binding
from sharded_spd.errors import ConfigError, UnsupportedError
from sharded_spd.projection.hostvec import HostVector
from sharded_spd.projection.layers import Plan
from sharded_spd.sharding.layout import BoundShard


class Scalars:
    """lr, lambda and the bound of the pull of each layer, and which have a gradient.

    Layers of one group with one setting share their scalars: each is read once.
    """

    def __init__(self, plan: Plan, binding: Binding, shards: Sequence[BoundShard]) -> None:
        kinds: dict[tuple[int, float | None, float | None], int] = {}
        self._kinds: list[tuple[Any, float | None, float | None, str]] = []
        kind_of, shard_of = [0] * len(plan.fqns), [0] * len(plan.fqns)
        for position, shard in enumerate(shards):
            for piece in shard.slices:
                own, column = binding.options[piece.layer], plan.column[piece.layer]
                key = (id(shard.param_group), own.weight_decay, own.max_pull)
                if key not in kinds:
                    kinds[key] = len(kinds)
                    self._kinds.append((shard.param_group, own.weight_decay, own.max_pull, piece.layer))
                kind_of[column], shard_of[column] = kinds[key], position
        # What is to be alike on the ranks of a scope: the kinds of its layers, each run of them once.
        self._kinds_of_scopes = [
            [kind for kind, _ in groupby(kind_of[plan.column[fqn]] for fqn in scope.fqns)]
            for scope in plan.scopes
        ]
        self._last: list[Any] = []
        self.checksums: list[int] = [0] * len(plan.scopes)
        """Of the scalars that were read last, one per scope of the plan."""
        self._kind_of = torch.tensor(kind_of, dtype=torch.long, device=plan.device)
        self._shard_of = torch.tensor(shard_of, dtype=torch.long, device=plan.device)
        self._vectors = [HostVector(plan.device) for _ in range(3)]
        self._has_grad, self._has_state = HostVector(plan.device), HostVector(plan.device)

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """Learning rate, lambda and bound of the pull now, float64 `[num_layers]` each.

        Raises:
            ConfigError: for one out of range, with the name of a layer that has it.
        """
        values: list[tuple[Any, Any, Any]] = []
        for group, weight_decay, max_pull, layer in self._kinds:
            decay = group["weight_decay"] if weight_decay is None else weight_decay
            pull = group.get("max_pull") if max_pull is None else max_pull
            limit = float("inf") if pull is None else pull
            _check(layer, group.get("lr"), decay, limit)
            values.append((group["lr"], decay, limit))
        columns = list(zip(*values, strict=True)) if values else [()] * 3
        self._sum_up([tuple(map(_told, own)) for own in values])
        lr, decay, limit = (v.update(c)[self._kind_of] for v, c in zip(self._vectors, columns, strict=True))
        return lr, decay, limit

    def _sum_up(self, values: list[Any]) -> None:
        if values != self._last:
            self._last = values
            self.checksums = [
                crc32(repr([values[kind] for kind in kinds]).encode()) for kinds in self._kinds_of_scopes
            ]

    def settings(self) -> dict[str, Any]:
        """The scalars that were read last, by the first layer that has them; for messages."""
        return {
            f"{name} of {layer!r}": value
            for (*_, layer), own in zip(self._kinds, self._last, strict=False)
            for name, value in zip(("lr", "weight_decay", "max_pull"), own, strict=True)
        }

    def has_grad(self, shards: Sequence[BoundShard]) -> Tensor:
        """1 for the layers with a gradient on this rank, float64 `[num_layers]`."""
        return self._has_grad.update_numbers([shard.grad is not None for shard in shards])[self._shard_of]

    def has_state(self, shards: Sequence[BoundShard]) -> Tensor:
        """1 for the layers that the base optimizer has stepped before, float64 `[num_layers]`."""
        return self._has_state.update_numbers([shard.has_state for shard in shards])[self._shard_of]

    def moves(self, shards: Sequence[BoundShard]) -> bool:
        """Whether any layer has a gradient and a learning rate, as far as the host can tell."""
        with_grad = {id(s.param_group): s.param_group for s in shards if s.grad is not None}
        return any(isinstance(g["lr"], Tensor) or g["lr"] != 0 for g in with_grad.values())


def _told(value: Any) -> float | None:
    """A scalar as the ranks compare it; None for one that the host would have to wait for."""
    return None if isinstance(value, Tensor) and value.device.type != "cpu" else float(value)


def _check(fqn: str, lr: Any, weight_decay: Any, max_pull: Any) -> None:
    """Whether a step's live scalars of one layer can be used.

    Raises:
        UnsupportedError: where its param group has no learning rate.
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
