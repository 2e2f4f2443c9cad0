"""The gradients that DeepSpeed's inner optimizer is handed, as whole layers.

Which element of which layer lies where is told by the values: every element of the model starts with a value
of its own, so that this map owes nothing to the package or to DeepSpeed's attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def distinct(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Layers in float32 of which no two elements are equal, none is zero, and `dtype` holds each exactly."""
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    steps = torch.arange(1, count // 2 + 2, dtype=torch.float32)
    # Eight bits of a mantissa at most: 128 values to each power of two.
    size = torch.exp2(torch.div(steps, 128, rounding_mode="floor")) * (1 + (steps % 128) / 128) / 4
    values = torch.cat([size, -size])[
        torch.randperm(2 * len(size), generator=torch.Generator().manual_seed(1))
    ]
    assert len(set(values.to(dtype).tolist())) == len(values)
    result, begin = {}, 0
    for name, shape in shapes.items():
        numel = torch.Size(shape).numel()
        result[name] = values[begin : begin + numel].view(shape).clone()
        begin += numel
    return result


class SeenGradients:
    """Watches `base`, whose tensors begin as `start`, a model of `distinct` elements."""

    def __init__(self, base: torch.optim.Optimizer, start: Mapping[str, Tensor]) -> None:
        self._shapes = {name: w.shape for name, w in start.items()}
        whole = torch.cat([w.reshape(-1) for w in start.values()])
        self._position = {float(value): i for i, value in enumerate(whole)}
        assert len(self._position) == len(whole), "two elements are equal, so neither tells its place"
        self._maps: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self._sum, self._count = torch.zeros(len(whole)), torch.zeros(len(whole))
        base.register_step_pre_hook(self._look)

    def _look(self, base: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in base.param_groups:
            for tensor in group["params"]:
                if tensor not in self._maps:  # its first step: the values are those of the start
                    found = [self._position.get(value, -1) for value in tensor.detach().reshape(-1).tolist()]
                    places = torch.tensor(found, dtype=torch.long)
                    here = (places >= 0).nonzero().reshape(-1)
                    self._maps[tensor] = here, places[here]
                here, places = self._maps[tensor]
                assert tensor.grad is not None
                self._sum[places] += tensor.grad.detach().reshape(-1).float()[here]
                self._count[places] += 1

    def take(self) -> dict[str, Tensor] | None:
        """What was handed over since the last call, None if there was no step; collective.

        Ranks that hold the same elements count with the mean of what they were handed.
        """
        total, count = self._summed(self._sum, self._count)
        self._sum.zero_()
        self._count.zero_()
        if not count.any():
            return None
        assert (count == count[0]).all(), "some elements were stepped more often than others"
        return self._as_layers(total / count)

    def masters(self) -> dict[str, Tensor]:
        """The layers as the inner optimizer has them, once it has stepped; collective.

        DeepSpeed's own accessors mix layers up with round_robin_gradients.
        """
        values, count = torch.zeros_like(self._sum), torch.zeros_like(self._sum)
        for tensor, (here, places) in self._maps.items():
            values[places] = tensor.detach().reshape(-1).float()[here]
            count[places] = 1
        total, count = self._summed(values, count)
        assert count.all(), "some elements belong to no tensor of the optimizer"
        return self._as_layers(total / count)

    @staticmethod
    def _summed(values: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.stack([values, count]).double()  # the mean of equal values is exact
        dist.all_reduce(both)
        return both[0], both[1]

    def _as_layers(self, whole: Tensor) -> dict[str, Tensor]:
        result, begin = {}, 0
        for name, shape in self._shapes.items():
            result[name] = whole[begin : begin + shape.numel()].view(shape).float()
            begin += shape.numel()
        return result
