"""How a slice splits into the rows of its layer, sums per row, and back from rows to elements."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from sharded_spd.rules.statistics import fixed_sum
from sharded_spd.sharding.layout import Box, ShardSlice


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
    """How a slice splits into rows: at most a partial row, full rows, and another partial row."""
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
