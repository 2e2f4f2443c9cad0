"""An encoder's original task, without a head: find the partner of a text among others by cosine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sharded_spd.errors import ConfigError
from sharded_spd.finetune.data.examples import Batch
from sharded_spd.finetune.metrics import Outcome

Encode = Callable[[Batch], Tensor]
"""From `input_ids` and what else the tokenizer gives, `[n, length]`, to vectors `[n, d]`."""


class TextPools:
    """Pairs of texts in pools of one size: each example is a pool, in which a text is to find its partner.

    A batch has each tensor of the tokenizer as `text/NAME` and `partner/NAME`, `[pools, size, length]`.
    """

    lazy = False

    def __init__(self, pairs: Sequence[tuple[str, str]], tokenizer: Any, *, size: int, length: int) -> None:
        if not 1 < size <= len(pairs):
            raise ConfigError(f"data.pool: wanted 2 to {len(pairs)} pairs that can be told apart, got {size}")
        self.size, self._tokenizer, self._length = size, tokenizer, length
        self._pools = [pairs[at : at + size] for at in range(0, len(pairs) - size + 1, size)]

    def __len__(self) -> int:
        return len(self._pools)

    def units(self, indices: Tensor) -> float:
        """The pairs."""
        return float(len(indices) * self.size)

    def take(self, indices: Tensor) -> Batch:
        """The pools at `indices`."""
        found: dict[str, Tensor] = {}
        for place, side in enumerate(("text", "partner")):
            texts = [pair[place] for index in indices.tolist() for pair in self._pools[index]]
            made = self._tokenizer(
                texts, truncation=True, max_length=self._length, padding=True, return_tensors="pt"
            )
            for name, tensor in made.items():
                found[f"{side}/{name}"] = tensor.view(len(indices), self.size, -1)
        return found


def is_pools(batch: Batch) -> bool:
    """Whether a batch is of `TextPools`."""
    return "text/input_ids" in batch


def match(batch: Batch, encode: Encode) -> Outcome:
    """The cosine of every text of a pool with every partner, `[pools, size, size]`; the right one is its own.

    One pool and one side at a time, so that every rank runs the same forwards.
    """
    found = []
    for pool in range(len(batch["text/input_ids"])):
        sides = []
        for side in ("text", "partner"):
            start = f"{side}/"
            own = {n.removeprefix(start): t[pool] for n, t in batch.items() if n.startswith(start)}
            sides.append(torch.nn.functional.normalize(encode(own).float(), dim=-1))
        found.append(sides[0] @ sides[1].T)
    cosines = torch.stack(found)
    right = torch.arange(cosines.shape[-1], device=cosines.device)
    return Outcome(cosines, right.expand(cosines.shape[:2]))


def mean_pooled(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean of the last layer's vectors `[n, length, d]` over the tokens that are no padding, `[n, d]`."""
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
