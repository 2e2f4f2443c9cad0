"""Local float64 sums over the slices of a layer.

Sums run in float64 over blocks of fixed size, so that they depend neither on the number of threads nor,
beyond rounding at 1e-14, on how a layer is split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

CHUNK = 1 << 16
"""Elements processed at a time: limits float64 temporaries to 512 KiB each."""

_BLOCK = 4096
"""Elements of one partial sum. Below torch's grain size (32,768), so that one thread adds up each partial
sum."""


@dataclass(slots=True)
class Block:
    """Part of one slice of one layer, 1-D views in the stored dtype; the float64 forms are made on first use.

    `weight` is the current weight: before the base step w, after it w~. `anchor` None stands for zero. `kept`
    is w after the step (only for rules that keep it). `state` holds the rule's shard state.
    """

    weight: Tensor
    anchor: Tensor | None = None
    raw_grad: Tensor | None = None
    grad_factor: float | Tensor = 1.0
    kept: Tensor | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    _delta: Tensor | None = None
    _grad: Tensor | None = None

    @property
    def delta(self) -> Tensor:
        """w - w0 before the base step, w~ - w0 after it, float64."""
        if self._delta is None:
            weight = self.weight.double()
            if self.anchor is None:
                self._delta = weight
            else:
                self._delta = weight - self.anchor.to(
                    device=weight.device, dtype=torch.float64, non_blocking=True
                )
        return self._delta

    @property
    def grad(self) -> Tensor:
        """The gradient of the minimised loss, float64: unscaled, negated under `maximize`."""
        if self.raw_grad is None:
            raise RuntimeError(
                "this block has no gradient: a rule may read gradients only before the base step"
            )
        if self._grad is None:
            grad = self.raw_grad.double()
            self._grad = grad if self._unscaled else grad * self.grad_factor
        return self._grad

    @property
    def _unscaled(self) -> bool:
        return not isinstance(self.grad_factor, Tensor) and self.grad_factor == 1.0

    @property
    def update(self) -> Tensor:
        """u = w~ - w, float64; only after the base step and for rules that keep w."""
        if self.kept is None:
            raise RuntimeError("this block has no kept weight: declare keeps_w=True in the rule's RuleSpec")
        return self.weight.double() - self.kept.double()

    @property
    def kept_delta(self) -> Tensor:
        """w - w0 before the base step, float64, also after it; only for rules that keep w."""
        return self.delta - self.update


@dataclass(frozen=True, slots=True)
class Statistic:
    """A sum over the elements of a layer, or of each of its rows, of `term(block)` (elementwise, float64)."""

    name: str
    term: Callable[[Block], Tensor]
    per: Literal["layer", "row"] = "layer"


GRAD_DOT_DELTA = Statistic("grad_dot_delta", lambda b: b.grad * b.delta)
"""<g, d>: minus the condition c of SPD."""

DELTA_SQ = Statistic("delta_sq", lambda b: b.delta * b.delta)
"""|w - w0|^2 before the base step, |w~ - w0|^2 after it."""

GRAD_SQ = Statistic("grad_sq", lambda b: b.grad * b.grad)
"""|g|^2."""

GRAD_DOT_PREVIOUS = Statistic("grad_dot_previous", lambda b: b.grad * b.state["previous"])
"""<g, x> with x the rule's shard state "previous"."""

UPDATE_GAIN = Statistic("update_gain", lambda b: b.update * (2 * b.delta - b.update))
"""|w~ - w0|^2 - |w - w0|^2 free of cancellation: u*(2d + u) with d before the step, u*(2d~ - u) with d~
after it."""

ROW_L1 = Statistic("row_l1", lambda b: b.delta.abs(), per="row")
"""L1 norm of every row of w - w0 (w~ - w0 after the base step); a row is one index of dim 0."""


def fixed_sum(x: Tensor) -> Tensor:
    """Sum of a 1-D tensor in an order that depends on its length only, not on the number of threads."""
    while x.numel() > _BLOCK:
        whole = x.numel() // _BLOCK * _BLOCK
        parts = x[:whole].view(-1, _BLOCK).sum(1)
        x = parts if whole == x.numel() else torch.cat([parts, x[whole:].sum().view(1)])
    return x.sum()


def layer_sums(blocks: Iterator[Block], statistics: tuple[Statistic, ...]) -> list[Tensor]:
    """The local sum of each statistic over the blocks of one slice, 0-d float64 each."""
    totals: list[Tensor] = []
    for block in blocks:
        sums = [fixed_sum(s.term(block)) for s in statistics]
        totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
    return totals
