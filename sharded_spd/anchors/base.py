"""The seam between the projector and where pre-trained values come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch

from sharded_spd.layout import ShardSlice


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
