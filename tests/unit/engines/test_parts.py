"""The arithmetic of flat tensors against a brute-force oracle: elements numbered, concatenated, cut."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharded_spd.engines.flat import chunk, overlap, tile
from sharded_spd.rules.rows import row_count, row_spans
from sharded_spd.sharding.layout import FlatRange, ShardSlice

SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=8)
PADDINGS = st.lists(st.integers(0, 4), min_size=8, max_size=8)


def _numbered(
    shapes: list[tuple[int, ...]], paddings: list[int]
) -> tuple[list[str | None], list[int], torch.Tensor]:
    """Names and sizes with padding between, and for each element its (layer, index), padding (-1, -1)."""
    names: list[str | None] = []
    numels: list[int] = []
    rows = []
    for i, (shape, padding) in enumerate(zip(shapes, paddings, strict=False)):
        if padding:
            names.append(None)
            numels.append(padding)
            rows.append(torch.full((padding, 2), -1))
        numel = prod(shape)
        names.append(f"layer{i}")
        numels.append(numel)
        rows.append(torch.stack([torch.full((numel,), i), torch.arange(numel)], 1))
    return names, numels, torch.cat(rows)


def _check(piece: ShardSlice, window: torch.Tensor, seen: list[torch.Tensor]) -> None:
    """The slice's elements of the window are those of the layer that it names; they are counted in `seen`."""
    layer, part = int(piece.layer.removeprefix("layer")), window[piece.offset : piece.offset + piece.numel]
    assert len(part) == piece.numel, "beyond the window"
    assert isinstance(piece.region, FlatRange)
    assert (part[:, 0] == layer).all()
    assert torch.equal(part[:, 1], torch.arange(piece.region.start, piece.region.start + piece.numel))
    seen[layer][piece.region.start : piece.region.start + piece.numel] += 1


@settings(max_examples=300, deadline=None)
@given(shapes=SHAPES, paddings=PADDINGS, world=st.integers(1, 9))
def test_chunks_tile_every_layer_once(shapes: list[tuple[int, ...]], paddings: list[int], world: int) -> None:
    """Equal chunks of a padded concatenation, as torch.chunk cuts it: FSDP1, fairscale."""
    names, numels, elements = _numbered(shapes, paddings)
    chunks = list(elements.chunk(world)) if len(elements) else []
    seen = [torch.zeros(prod(shape), dtype=torch.int64) for shape in shapes]
    for rank in range(world):
        own = chunks[rank] if rank < len(chunks) else elements[:0]
        window = chunk(len(elements), rank, world)
        assert window[1] - window[0] == len(own)
        slices = tile(names, numels, window)
        assert [piece.layer for piece in slices] == [name for name in names if name is not None]
        for piece in slices:
            _check(piece, own, seen)
    assert all((count == 1).all() for count in seen)


@settings(max_examples=300, deadline=None)
@given(shapes=SHAPES, paddings=PADDINGS, cuts=st.lists(st.integers(0, 60), max_size=6), at=st.integers(0, 7))
def test_any_windows_tile_every_layer_once(
    shapes: list[tuple[int, ...]], paddings: list[int], cuts: list[int], at: int
) -> None:
    """Windows of any sizes, each somewhere in a larger tensor: ZeRO's partitions."""
    names, numels, elements = _numbered(shapes, paddings)
    total = len(elements)
    edges = [0, *sorted(min(cut, total) for cut in cuts), total]
    seen = [torch.zeros(prod(shape), dtype=torch.int64) for shape in shapes]
    for window in pairwise(edges):
        held = torch.cat([torch.full((at, 2), -1), elements[window[0] : window[1]]])
        begin = 0
        for name, numel in zip(names, numels, strict=True):
            if name is not None:
                _check(overlap(name, begin, numel, window, at=at), held, seen)
            begin += numel
    assert all((count == 1).all() for count in seen)


@settings(max_examples=300, deadline=None)
@given(shapes=SHAPES, world=st.integers(1, 9))
def test_layers_cut_one_by_one(shapes: list[tuple[int, ...]], world: int) -> None:
    """Every layer in chunks of its own: ZeRO-3, fairscale without flattening."""
    for i, shape in enumerate(shapes):
        numel = prod(shape)
        seen = [torch.zeros(prod(other), dtype=torch.int64) for other in shapes]
        elements = torch.stack([torch.full((numel,), i), torch.arange(numel)], 1)
        for rank in range(world):
            window = chunk(numel, rank, world)
            _check(tile([f"layer{i}"], [numel], window)[0], elements[window[0] : window[1]], seen)
        assert (seen[i] == 1).all()


@settings(max_examples=300, deadline=None)
@given(shapes=SHAPES, paddings=PADDINGS, world=st.integers(1, 9))
def test_rows_of_the_slices(shapes: list[tuple[int, ...]], paddings: list[int], world: int) -> None:
    """Every slice falls into the rows that its elements have."""
    names, numels, elements = _numbered(shapes, paddings)
    for rank in range(world):
        window = chunk(len(elements), rank, world)
        own = elements[window[0] : window[1]]
        for piece in tile(names, numels, window):
            shape = shapes[int(piece.layer.removeprefix("layer"))]
            width = max(prod(shape) // max(row_count(shape), 1), 1)
            index = own[piece.offset : piece.offset + piece.numel, 1]
            rows = torch.full((piece.numel,), -1)
            for span in row_spans(piece, shape):
                for r in range(span.num_rows):
                    begin = span.offset + r * span.width
                    assert (rows[begin : begin + span.width] == -1).all()
                    rows[begin : begin + span.width] = span.first_row + r
            assert torch.equal(rows, index // width if len(shape) > 1 else torch.zeros_like(index))
