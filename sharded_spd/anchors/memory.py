"""Anchors in memory: tensors given by the user, and zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sharded_spd.errors import AnchorError
from sharded_spd.sharding.layout import Box, FlatRange, ShardSlice


class ZeroAnchor:
    """Every layer is anchored at zero, which takes no memory."""

    source = "zero"

    def problems(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Zero fits every layer."""
        return []

    def fetch(self, piece: ShardSlice) -> Tensor | None:
        """None, which stands for zero."""
        return None


class TensorAnchor:
    """Anchors from tensors by FQN: whole ones, or DTensors placed as the layer is; None stands for zero."""

    def __init__(self, tensors: Mapping[str, Tensor | None], source: str = "tensors") -> None:
        self.source = source
        self._tensors = tensors

    def problems(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """One sentence for each layer that has no tensor, or one of another shape."""
        result = []
        for fqn, shape in shapes.items():
            if fqn not in self._tensors:
                result.append(f"{fqn}: no anchor tensor given")
                continue
            tensor = self._tensors[fqn]
            if tensor is not None and tuple(tensor.shape) != shape:
                result.append(f"{fqn}: anchor has shape {tuple(tensor.shape)}, the layer {shape}")
        return result

    @torch.no_grad()
    def fetch(self, piece: ShardSlice) -> Tensor | None:
        """A copy of the values of `piece`, `[piece.numel]`.

        Raises:
            AnchorError: for a DTensor that is not distributed as the layer is.
        """
        tensor = self._tensors[piece.layer]
        if tensor is None:
            return None
        if isinstance(tensor, DTensor):
            local, (box,) = tensor.to_local(), tensor.__create_chunk_list__()
            if piece.region != Box(tuple(box.offsets), tuple(box.sizes)):
                raise AnchorError(
                    f"layer {piece.layer!r}: the anchor is a DTensor with placements {tensor.placements}, "
                    f"which give this rank another part than it has of the layer ({piece.region}); "
                    "distribute the anchor as the layer is, or give the whole tensor"
                )
            return local.detach().reshape(-1).clone()
        return take_region(tensor.detach(), piece)


def take_region(whole: Tensor, piece: ShardSlice) -> Tensor:
    """A copy of what `piece` holds of a whole layer, `[piece.numel]`."""
    if isinstance(piece.region, FlatRange):
        return whole.reshape(-1)[piece.region.start : piece.region.start + piece.numel].clone()
    box = tuple(slice(o, o + n) for o, n in zip(piece.region.offsets, piece.region.sizes, strict=True))
    return whole[box].reshape(-1).clone()
