"""Local float64 sums over the slices of a layer, and the one reduction that makes them whole.

Sums run in float64 over blocks of fixed size, so that they depend neither on the number of threads nor,
beyond rounding at 1e-14, on how a layer is split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sharded_spd.layout import Box, Scope, ShardSlice

CHUNK = 1 << 16
"""Elements that are worked on at a time: bounds the float64 temporaries to 512 KiB each."""

_BLOCK = 4096
"""Elements of one partial sum. Below torch's grain size (32,768), so that one thread adds up each partial "
"sum."""


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
        """The gradient of what is minimised, float64: unscaled, its sign turned under `maximize`."""
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
"""|w~ - w0|^2 - |w - w0|^2 free of cancellation: u*(2d + u) with d before the step, u*(2d~ - u) with d~ "
"after it."""

ROW_L1 = Statistic("row_l1", lambda b: b.delta.abs(), per="row")
"""L1 norm of every row of w - w0 (w~ - w0 after the base step); a row is one index of dim 0."""


def fixed_sum(x: Tensor) -> Tensor:
    """Sum of a 1-D tensor in an order that depends on its length only, not on the number of threads."""
    while x.numel() > _BLOCK:
        whole = x.numel() // _BLOCK * _BLOCK
        parts = x[:whole].view(-1, _BLOCK).sum(1)
        x = parts if whole == x.numel() else torch.cat([parts, x[whole:].sum().view(1)])
    return x.sum()


@dataclass(frozen=True, slots=True)
class RowSpan:
    """`num_rows` pieces of `width` elements, of rows `first_row`, ..., from `offset` in the slice."""

    offset: int
    first_row: int
    num_rows: int
    width: int


def row_count(shape: tuple[int, ...]) -> int:
    """Rows of a layer: the size of dim 0; 1 for a layer of one dim or none."""
    return shape[0] if len(shape) > 1 else 1


def row_spans(piece: ShardSlice, shape: tuple[int, ...]) -> list[RowSpan]:
    """How a slice falls into rows: at most a partial row, whole rows, and another partial row."""
    if piece.numel == 0:
        return []
    if len(shape) <= 1:
        return [RowSpan(0, 0, 1, piece.numel)]
    if isinstance(piece.region, Box):
        rows = piece.region.sizes[0]
        return [RowSpan(0, piece.region.offsets[0], rows, piece.numel // rows)]
    row, start, stop = prod(shape[1:]), piece.region.start, piece.region.start + piece.numel
    first, last = -(-start // row), stop // row
    if first > last:
        return [RowSpan(0, start // row, 1, piece.numel)]
    spans = [
        RowSpan(0, first - 1, 1, first * row - start),
        RowSpan(first * row - start, first, last - first, row),
        RowSpan(last * row - start, last, 1, stop - last * row),
    ]
    return [s for s in spans if s.num_rows and s.width]


def layer_sums(blocks: Iterator[Block], statistics: tuple[Statistic, ...]) -> list[Tensor]:
    """The local part of each statistic over the blocks of one slice, 0-d float64 each."""
    totals: list[Tensor] = []
    for block in blocks:
        sums = [fixed_sum(s.term(block)) for s in statistics]
        totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
    return totals


def add_row_sums_(out: Tensor, terms: Tensor, spans: list[RowSpan], begin: int) -> None:
    """Add `terms`, elements `[begin, begin + len)` of a slice, to their rows in `out` (modified in place)."""
    end = begin + terms.numel()
    for span in spans:
        a, b = max(begin, span.offset), min(end, span.offset + span.num_rows * span.width)
        while a < b:
            row, within = divmod(a - span.offset, span.width)
            whole = 0 if within else (b - a) // span.width
            if whole:
                sums = terms[a - begin : a - begin + whole * span.width].view(whole, span.width)
                part = sums.sum(1) if whole > 1 else fixed_sum(sums.view(-1)).view(1)
                a += whole * span.width
            else:
                stop = min(b, span.offset + (row + 1) * span.width)
                whole, part = 1, fixed_sum(terms[a - begin : stop - begin]).view(1)
                a = stop
            out[span.first_row + row : span.first_row + row + whole] += part


def expand_rows(values: Tensor, spans: list[RowSpan], begin: int, end: int) -> Tensor:
    """The row value of each of the elements `[begin, end)` of a slice: `[num_rows]` -> `[end - begin]`."""
    parts = []
    for span in spans:
        a, b = max(begin, span.offset), min(end, span.offset + span.num_rows * span.width)
        if a < b:
            local = torch.arange(a - span.offset, b - span.offset, device=values.device)
            parts.append(values[local // span.width + span.first_row])
    return torch.cat(parts) if parts else values[:0]


def sum_over_scopes_(per_layer: Tensor, fqns: Sequence[str], scopes: Sequence[Scope]) -> None:
    """Sum `per_layer` `[num_layers, ...]` over its scopes, one after the other (modified in place)."""
    column = {fqn: i for i, fqn in enumerate(fqns)}
    for scope in scopes:
        columns = [column[fqn] for fqn in scope.layers if fqn in column]
        part = per_layer[columns]
        all_reduce_(part, scope.group)
        per_layer[columns] = part


def all_reduce_(payload: Tensor, group: ProcessGroup) -> None:
    """SUM over `group` (modified in place), on the device that the group's backend wants."""
    if payload.device.type == "cpu" and dist.get_backend(group) == "nccl":
        on_device = payload.cuda()
        dist.all_reduce(on_device, group=group)
        payload.copy_(on_device)
    else:
        dist.all_reduce(payload, group=group)
