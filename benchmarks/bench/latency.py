"""Arithmetic of an all-reduce: how long it takes on so many ranks, for stated constants."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2


@dataclass(frozen=True, slots=True)
class Network:
    """`latency`: seconds of one message; `bandwidth`: bytes per second of one link.

    The defaults are assumed, not measured: NCCL between nodes on 200 Gbit/s InfiniBand.
    """

    latency: float = 8e-6
    bandwidth: float = 25e9

    def ring(self, payload: float, ranks: int) -> float:
        """Reduce-scatter and all-gather around a ring: 2 (p - 1) messages of n / p bytes."""
        return 2 * (ranks - 1) * (self.latency + payload / ranks / self.bandwidth)

    def tree(self, payload: float, ranks: int) -> float:
        """Up a binary tree and down again: 2 ceil(log2 p) messages of n bytes."""
        return 2 * ceil(log2(ranks)) * (self.latency + payload / self.bandwidth) if ranks > 1 else 0.0

    def best(self, payload: float, ranks: int) -> float:
        """What a library that knows both would take."""
        return min(self.ring(payload, ranks), self.tree(payload, ranks))
