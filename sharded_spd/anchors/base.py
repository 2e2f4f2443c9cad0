"""The seam between the projector and where pre-trained values come from."""

from __future__ import annotations

from collections.abc import Mapping
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
