"""What decides whether a DeepSpeed snapshot may be kept in low precision."""

from __future__ import annotations

import torch

from sharded_spd.engines.zero_layout import Flat, holds_exactly
from sharded_spd.sharding.layout import FlatRange, ShardSlice

PIECES = (ShardSlice("a", 0, 3, FlatRange(0)), ShardSlice("b", 4, 2, FlatRange(0)))


def _flat(master: torch.Tensor, low: torch.Tensor) -> Flat:
    return Flat(master, low, PIECES, 0)


def test_padding_is_not_compared() -> None:
    """DeepSpeed never writes it, so any bits may stand there."""
    low = torch.tensor([1.0, 2.0, 3.0, torch.nan, 4.0, 5.0, torch.inf, 0.0], dtype=torch.bfloat16)
    master = low.float()
    master[6] = 1e-20
    assert holds_exactly(_flat(master, low))


def test_every_layer_is_compared() -> None:
    low = torch.ones(8, dtype=torch.bfloat16)
    master = low.float()
    master[5] += 2.0**-20
    assert not holds_exactly(_flat(master, low))
