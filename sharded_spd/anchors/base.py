"""The interface between the projector and the sources of pre-trained values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from sharded_spd.sharding.layout import ModelFacts, ShardSlice


class Values(Protocol):
    """The values of one slice, 1-D, read in chunks: a tensor, or an object that returns chunks as tensors.

    A chunk may be a view of read-only memory.
    """

    @property
    def dtype(self) -> torch.dtype:
        """Of every chunk."""
        ...

    @property
    def device(self) -> torch.device:
        """Of every chunk."""
        ...

    def numel(self) -> int:
        """The number of values."""
        ...

    def __getitem__(self, cut: slice, /) -> torch.Tensor:
        """The values `[cut.start, cut.stop)`, 1-D; step 1."""
        ...


@runtime_checkable
class DiskValues(Values, Protocol):
    """Values that stay in their file, which may change or disappear while in use."""

    def changed(self) -> str | None:
        """How the file has changed since it was opened, if at all: it must not be read then."""
        ...

    def check(self) -> None:
        """Raise AnchorError if the file has changed."""
        ...

    def whole(self) -> torch.Tensor | None:
        """All values as one tensor, without a copy; None if they are not contiguous."""
        ...


@runtime_checkable
class AnchorStore(Protocol):
    """A source of pre-trained values, read slice by slice."""

    @property
    def source(self) -> str:
        """What the values are, for messages and checkpoints: "snapshot", "zero", a path."""
        ...

    def problems(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """One sentence per layer that this store cannot serve with that full shape."""
        ...

    def fetch(self, piece: ShardSlice) -> Values | None:
        """The values of `piece`, 1-D `[piece.numel]`, in the stored dtype; None: anchored at zero.

        The result is a tensor of the caller's own, or values that read chunks on demand.
        """
        ...


def is_on_disk(store: AnchorStore | str) -> bool:
    """Whether a store's values are read from files in every step: it has a true `on_disk`."""
    return bool(getattr(store, "on_disk", False))


@runtime_checkable
class NamedStore(AnchorStore, Protocol):
    """A store that finds the model's layers by name; the names in the store may differ."""

    @property
    def names(self) -> Mapping[str, str | None]:
        """The tensor that each layer takes its values from; None: there is none."""
        ...

    def know(self, facts: ModelFacts, fqns: Iterable[str]) -> None:
        """Store the model's facts about its layers, and all their names."""
        ...

    def strays(self, model_fqns: Sequence[str]) -> tuple[list[str], list[str]]:
        """Tensors of layers that the model lacks: those that it leaves out on purpose, and the others."""
        ...

    def fetch(self, piece: ShardSlice, weight: torch.Tensor | None = None) -> Values | None:
        """As any store's; `weight` `[piece.numel]` supplies rows of a resized table that the store lacks."""
        ...

    def refuse_zero(self, piece: ShardSlice, weight: torch.Tensor) -> str | None:
        """Why a layer that the store lacks cannot be anchored at zero, if so."""
        ...


@dataclass(frozen=True, slots=True)
class Cast:
    """The effect of a change of dtype on this rank's slice of a layer.

    `fingerprint` is the slice's share of the layer's fingerprint before it; `worst` is the largest relative
    change of a value, 0 if none changed.
    """

    fingerprint: tuple[int, ...]
    worst: float


@runtime_checkable
class VouchedStore(AnchorStore, Protocol):
    """A store of pre-trained values that may know their expected fingerprints."""

    def expected(self, layer: str) -> tuple[int, ...] | None:
        """The expected fingerprint of the layer's stored values; None if unknown."""
        ...

    def expected_overall(self) -> str | None:
        """The expected fingerprint of all stored values together; None if unknown."""
        ...

    def cast(self, layer: str) -> Cast | None:
        """How the last `fetch` of the layer changed its values; None if its dtype is the stored one."""
        ...
