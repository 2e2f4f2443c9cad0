"""The seam between the projector and where pre-trained values come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from sharded_spd.sharding.layout import ModelFacts, ShardSlice


class Values(Protocol):
    """The values of one slice, 1-D, read in chunks: a tensor, or what makes tensors of its chunks.

    A chunk may be a view of memory that cannot be written to.
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
        """How many there are."""
        ...

    def __getitem__(self, cut: slice, /) -> torch.Tensor:
        """The values `[cut.start, cut.stop)`, 1-D; step 1."""
        ...


@runtime_checkable
class DiskValues(Values, Protocol):
    """Values that stay in their file, which may change or go while they are in use."""

    def changed(self) -> str | None:
        """What has become of the file since it was opened, if anything: it must not be read then."""
        ...

    def check(self) -> None:
        """Raises AnchorError where it has changed."""
        ...

    def whole(self) -> torch.Tensor | None:
        """All values as one tensor, without a copy; None where they do not lie together."""
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

        A tensor that is nobody else's, or values that read chunks on demand.
        """
        ...


def is_on_disk(store: AnchorStore | str) -> bool:
    """Whether a store's values are read from files in every step: it has a true `on_disk`."""
    return bool(getattr(store, "on_disk", False))


@runtime_checkable
class NamedStore(AnchorStore, Protocol):
    """A store that finds the model's layers by their names, which may be others there."""

    @property
    def names(self) -> Mapping[str, str | None]:
        """The tensor that each layer takes its values from; None: there is none."""
        ...

    def know(self, facts: ModelFacts, fqns: Iterable[str]) -> None:
        """Take note of what the model says of its layers, and of the names of all of them."""
        ...

    def strays(self, model_fqns: Sequence[str]) -> tuple[list[str], list[str]]:
        """Tensors of layers that the model lacks: those that it leaves out on purpose, and the others."""
        ...

    def fetch(self, piece: ShardSlice, weight: torch.Tensor | None = None) -> Values | None:
        """As any store's; `weight` `[piece.numel]` has the rows of a resized table that the store lacks."""
        ...

    def refuse_zero(self, piece: ShardSlice, weight: torch.Tensor) -> str | None:
        """Why a layer that the store lacks cannot be anchored at zero, if so."""
        ...


@dataclass(frozen=True, slots=True)
class Cast:
    """What a change of dtype did to this rank's slice of a layer.

    `fingerprint` is the slice's part of the layer's fingerprint before it; `worst` the largest relative
    change of a value, 0 where none changed.
    """

    fingerprint: tuple[int, ...]
    worst: float


@runtime_checkable
class VouchedStore(AnchorStore, Protocol):
    """A store of pre-trained values that may know what they ought to be."""

    def expected(self, layer: str) -> tuple[int, ...] | None:
        """The fingerprint that the layer's stored values ought to have; None where nothing says it."""
        ...

    def expected_overall(self) -> str | None:
        """The fingerprint that all that is stored ought to have together; None where nothing says it."""
        ...

    def cast(self, layer: str) -> Cast | None:
        """What the last `fetch` of the layer did to its values; None where its dtype is the stored one."""
        ...
