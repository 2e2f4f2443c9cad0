"""Gradients that decide which layers are pulled, the same for all variants.

A direction z is drawn per layer. With the gradient -z every layer moves along +z, away from its anchor, and
<g, w - w0> < 0: no layer is pulled. In a measured step the layers to be pulled get the gradient +z / 2^20: it
points back, <g, w - w0> > 0, while Adam's momentum still carries the layer away, so r > 0. That is the
disagreement that SPD acts on. The momentum fades, so between measured steps there is now and then one with
-z, which is not measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

BACK = 2.0**-20
"""A power of 2: changing to and fro loses no bit."""


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing its memory."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def chosen(index: int, fraction: float) -> bool:
    """Whether a layer is among the pulled ones, which are spread evenly."""
    return int((index + 1) * fraction + 1e-9) > int(index * fraction + 1e-9)


class Gradients:
    """One gradient per layer, that all variants' parameters share."""

    def __init__(self, like: Sequence[Parameter], pulled: float, rank: int) -> None:
        self.pulled = [chosen(i, pulled) for i in range(len(like))]
        self._away = True
        self.tensors: list[Tensor] = []
        generator = torch.Generator().manual_seed(1 + rank)
        for p in like:
            own = local(p)
            z = torch.empty(own.shape).uniform_(-0.01, 0.01, generator=generator)
            z = z.to(own.device, own.dtype)
            if isinstance(p, DTensor):
                z = DTensor.from_local(
                    z, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
                )
            self.tensors.append(z)

    def give(self, params: Sequence[Parameter]) -> None:
        """Make them the gradients of `params`; what has none, as the copy of bytes, gets none."""
        if not params:
            return
        for p, grad in zip(params, self.tensors, strict=True):
            p.grad = grad

    @torch.no_grad()
    def set_away(self, away: bool) -> None:
        """Whether all layers move away from their anchors, or the chosen ones are called back."""
        if away != self._away:
            for grad, chosen_one in zip(self.tensors, self.pulled, strict=True):
                if chosen_one:
                    local(grad).mul_(-BACK if self._away else -1 / BACK)
            self._away = away
