"""The seam between the projector and where pre-trained values come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from sharded_spd.layout import ShardSlice


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

    def fetch(self, piece: ShardSlice) -> torch.Tensor | None:
        """The values of `piece`, fresh, 1-D `[piece.numel]`, in the stored dtype; None: anchored at zero."""
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
