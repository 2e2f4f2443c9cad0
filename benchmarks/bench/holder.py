"""A module that holds the layers of a case."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench.shapes import Block
from torch import Tensor, nn


class Holder(nn.Module):
    """Parameters without a forward: an optimizer's step needs none."""

    def __init__(self, blocks: list[Block], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for values in initial_values(blocks, dtype, device):
            block = nn.Module()
            for name, value in values.items():
                block.register_parameter(name, nn.Parameter(value))
            self.blocks.append(block)


def initial_values(
    blocks: list[Block], dtype: torch.dtype, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The same weights on every call and rank; bfloat16 holds them exactly, so an anchor loses nothing."""
    generator = torch.Generator().manual_seed(0)
    for block in blocks:
        yield {
            name: torch.empty(shape).uniform_(-0.03, 0.03, generator=generator).bfloat16().to(device, dtype)
            for name, shape in block.items()
        }
