"""Tables of tokens that have another number of rows than the file's: resized vocabularies.

The first rows are the same tokens in both. What the file lacks is anchored at its values at binding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from math import prod

from sharded_spd.sharding.layout import Box, FlatRange, ModelFacts, ShardSlice

_TABLE = re.compile(
    r"(?:.*[._])?(?:\w*embed(?:ding)?s?|embed_\w+|\w+_embeddings?|wte|wpe|shared|lm_head|embed_out|output_layer)"
    r"\.(?:weight|bias)|(?:.*\.)?(?:lm_head|predictions)(?:\.decoder)?\.(?:weight|bias)"
)


def other_rows(names: Sequence[str], shape: Sequence[int], stored: Sequence[int], facts: ModelFacts) -> bool:
    """Whether a layer under these names is a table of tokens, and differs from the file's in rows alone."""
    same = len(shape) == len(stored) and 1 <= len(shape) <= 2 and tuple(shape[1:]) == tuple(stored[1:])
    table = any(name in facts.tables or _TABLE.fullmatch(name) for name in names)
    return same and table and shape[0] != stored[0]


def shared_part(piece: ShardSlice, shape: Sequence[int], rows: int) -> ShardSlice:
    """What a slice of a layer of `shape` has of its first `rows` rows: the first of its elements."""
    if isinstance(piece.region, FlatRange):
        count = min(max(rows * prod(shape[1:]) - piece.region.start, 0), piece.numel)
        return replace(piece, numel=count, region=piece.region if count else FlatRange(0))
    offsets, sizes = piece.region.offsets, piece.region.sizes
    own = min(max(rows - offsets[0], 0), sizes[0])
    region = Box(offsets if own else (0, *offsets[1:]), (own, *sizes[1:]))
    return replace(piece, numel=own * prod(sizes[1:]), region=region)


def said(layer: str, shape: Sequence[int], stored: Sequence[int]) -> str:
    """One layer's numbers, for the one who resized it."""
    if shape[0] > stored[0]:
        return (
            f"{layer} has {shape[0]} rows, the file {stored[0]}: the first {stored[0]} are anchored there, "
            f"the other {shape[0] - stored[0]} at their values at binding"
        )
    return f"{layer} has {shape[0]} rows, the file {stored[0]}: anchored at the first {shape[0]} of them"
