"""Tokens in memory or in a stream: one document per example, or several packed into each."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from sharded_spd.errors import ConfigError
from sharded_spd.finetune.data.encode import Tokens
from sharded_spd.finetune.data.examples import Batch
from sharded_spd.finetune.metrics import IGNORED


@dataclass(frozen=True)
class PackedExample:
    """One example: the tokens of one or several documents, and where each of these begins."""

    tokens: Tokens
    starts: tuple[int, ...] = (0,)


def documents(found: Iterable[Tokens], *, length: int) -> Iterator[PackedExample]:
    """One example per document, cut off at `length`; what has nothing to predict is left out."""
    for tokens in found:
        piece = tokens.cut(0, length)
        if piece.targets.any():
            yield PackedExample(piece)


def packed(found: Iterable[Tokens], *, length: int, whole: bool = False) -> Iterator[PackedExample]:
    """Examples of `length` tokens, the last one shorter: documents end to end, cut where one is full.

    `whole`: what does not fit begins a new example, so that only documents longer than that are cut.
    """
    parts: list[Tokens] = []
    size = 0
    for tokens in found:
        at = 0
        if whole and size + len(tokens) > length:
            yield from _joined(parts)
            parts, size = [], 0
        while at < len(tokens):
            part = tokens.cut(at, at + length - size)
            parts.append(part)
            at, size = at + len(part), size + len(part)
            if size == length:
                yield from _joined(parts)
                parts, size = [], 0
    yield from _joined(parts)


def _joined(parts: Sequence[Tokens]) -> Iterator[PackedExample]:
    if not any(part.targets.any() for part in parts):
        return
    sizes = [len(part) for part in parts]
    starts = tuple(sum(sizes[:at]) for at in range(len(sizes)))
    joined = Tokens(np.concatenate([p.ids for p in parts]), np.concatenate([p.targets for p in parts]))
    yield PackedExample(joined, starts)


def collate(pieces: Sequence[PackedExample], *, pad: int, by_position: bool) -> Batch:
    """`input_ids` and `labels` `[n, longest]`, filled up with `pad` on the right.

    `by_position`: also `position_ids`, which begin again at each document, so that none sees another; else
    the `attention_mask`.
    """
    width = max(len(piece.tokens) for piece in pieces)
    ids = torch.full((len(pieces), width), pad, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    second = torch.zeros_like(ids)
    for row, piece in enumerate(pieces):
        own = torch.from_numpy(piece.tokens.ids.astype(np.int64))
        size = len(own)
        ids[row, :size] = own
        labels[row, :size] = own.masked_fill(~torch.from_numpy(piece.tokens.targets), IGNORED)
        if by_position:
            edges = [*piece.starts, size, width]
            for start, stop in pairwise(edges):
                second[row, start:stop] = torch.arange(stop - start)
        else:
            second[row, :size] = 1
    return {"input_ids": ids, "labels": labels, "position_ids" if by_position else "attention_mask": second}


class TokenSet:
    """Examples of tokens in memory, end to end: 5 bytes per token."""

    lazy = False

    def __init__(self, pieces: Iterable[PackedExample], *, pad: int, by_position: bool) -> None:
        self._pad, self._by_position = pad, by_position
        every = list(pieces)
        self._starts = [piece.starts for piece in every]
        sizes = np.array([0, *(len(piece.tokens) for piece in every)], np.int64)
        self._edges = sizes.cumsum()
        self._ids = np.concatenate([np.empty(0, np.int32), *(piece.tokens.ids for piece in every)])
        self._targets = np.concatenate([np.empty(0, np.bool_), *(piece.tokens.targets for piece in every)])
        self._counts = torch.tensor([int(piece.tokens.targets.sum()) for piece in every])

    def __len__(self) -> int:
        return len(self._starts)

    def units(self, indices: torch.Tensor) -> float:
        """The tokens that are predicted."""
        return float(self._counts[indices].sum())

    def piece(self, index: int) -> PackedExample:
        """One example."""
        start, stop = self._edges[index], self._edges[index + 1]
        return PackedExample(Tokens(self._ids[start:stop], self._targets[start:stop]), self._starts[index])

    def take(self, indices: torch.Tensor) -> Batch:
        """Those at `indices`, filled up to the longest."""
        pieces = [self.piece(index) for index in indices.tolist()]
        return collate(pieces, pad=self._pad, by_position=self._by_position)


@dataclass(frozen=True)
class TokenStream:
    """Examples made while the files are read, without end, shuffled within a buffer of documents.

    `documents`: all documents once, in the files' order.
    """

    documents: Callable[[], Iterator[Tokens]]
    cut: Callable[[Iterable[Tokens]], Iterator[PackedExample]]
    length: int
    buffer: int
    pad: int
    by_position: bool

    def examples(self, seed: int) -> Iterator[PackedExample]:
        """The same on every rank.

        Raises:
            ConfigError: no document has anything to learn within an example's length.
        """
        made: list[None] = []
        for piece in self.cut(self._shuffled(random.Random(seed), made)):
            made[:] = [None]
            yield piece

    def _shuffled(self, order: random.Random, made: Sequence[None]) -> Iterator[Tokens]:
        spent = 0
        kept: list[Tokens] = []
        while True:
            if not made and spent > 2 * self.length:
                raise ConfigError(
                    f"data.train: no document has anything to learn within {self.length} tokens: longer "
                    "prompts than data.max_length?"
                )
            for tokens in self.documents():
                spent += len(tokens)
                if len(kept) < self.buffer:
                    kept.append(tokens)
                    continue
                at = order.randrange(len(kept))
                yield kept[at]
                kept[at] = tokens
            order.shuffle(kept)
            yield from kept
            kept = []

    def units_of(self, examples: Sequence[PackedExample]) -> float:
        """The tokens that are predicted."""
        return float(sum(int(piece.tokens.targets.sum()) for piece in examples))

    def collate(self, examples: Sequence[PackedExample]) -> Batch:
        """Filled up to the longest."""
        return collate(examples, pad=self.pad, by_position=self.by_position)
