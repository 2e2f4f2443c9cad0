"""Checks a backend against plain torch on this machine."""

from __future__ import annotations

import torch
from torch import Tensor

from sharded_spd.kernels.base import Backend, Moments, Slice
from sharded_spd.kernels.reference import ReferenceKernels

_NUMEL = 20_003
_ADAM = (0.9, 0.999, 1e-8, 0.01, 0.5)


def check(backend: Backend, device_type: str) -> None:
    """Compare one step of a few thousand elements with plain torch. Waits for the device.

    Raises:
        RuntimeError: where the results differ by more than rounding.
    """
    for name, ours, theirs in zip(
        ("sums", "sums with Adam", "pulled weights", "first moments", "second moments"),
        _step(backend, device_type),
        _step(ReferenceKernels(), device_type),
        strict=True,
    ):
        if not torch.allclose(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6):
            worst = (ours.double() - theirs.double()).abs().max().item()
            raise RuntimeError(
                f"{backend.name} kernels give other {name} than plain torch (by {worst:.3g}) on this machine"
            )


def _step(backend: Backend, device_type: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    weight, anchor, grad, mean, square = (
        torch.randn(_NUMEL, generator=generator).to(device_type) for _ in range(5)
    )
    square = square.abs()
    table = backend.table([Slice(weight, 3, _NUMEL - 5, anchor[3:-2], grad, -1.0)])
    numbers = torch.tensor([_ADAM], dtype=torch.float64, device=device_type)
    sums = table.sums(grads=True)
    with_adam = table.adam_([Moments(mean, square)], numbers)
    table.pull_(torch.tensor([0.3], dtype=torch.float64, device=device_type))
    return sums, with_adam, weight, mean, square
