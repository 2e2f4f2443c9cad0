"""The interface of kernels: their data, and the operations of every backend."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sharded_spd.anchors.base import Values
from sharded_spd.rules.statistics import DELTA_SQ, GRAD_DOT_DELTA, Statistic

FORMED: dict[Statistic, int] = {GRAD_DOT_DELTA: 0, DELTA_SQ: 1}
"""The statistics that kernels compute, and their columns in a row of sums."""


@dataclass(slots=True)
class Slice:
    """Elements `[offset, offset + numel)` of `weight` and of `grad`, contiguous tensors, and their anchor.

    `anchor` is 1-D `[numel]`; None stands for zero. `grad_factor` turns `grad` into the gradient of what is
    minimised; a tensor of it is 0-d, on the gradient's device.
    """

    weight: Tensor
    offset: int
    numel: int
    anchor: Values | None
    grad: Tensor | None = None
    grad_factor: float | Tensor = 1.0

    def flat_weight(self) -> Tensor:
        """A 1-D view of the slice's weights."""
        return self.weight.detach().view(-1)[self.offset : self.offset + self.numel]

    def flat_grad(self) -> Tensor | None:
        """A 1-D view of the slice's gradient."""
        if self.grad is None:
            return None
        return self.grad.detach().view(-1)[self.offset : self.offset + self.numel]


@dataclass(slots=True)
class Moments:
    """Adam's state of the tensor that a slice is part of, of one dtype; the last one only with amsgrad."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors that a step changes."""
        return self.exp_avg, self.exp_avg_sq, self.max_exp_avg_sq


ADAM_NUMBERS = ("beta1", "beta2", "eps", "step_size", "root_correction")
"""Columns of Adam's numbers: step_size = lr / (1 - beta1^t), root_correction = sqrt(1 - beta2^t)."""


class Table(Protocol):
    """Slices of one device as a backend works on them: one call, or launch, for all of them.

    Sums are float64, added up in an order that depends on a slice's length alone. What is written through an
    address is told to autograd (`increment_version`), as torch's in-place operations do: else a backward
    through values that were saved before the step would be wrong in silence.
    """

    def sums(self, *, grads: bool) -> Tensor:
        """<f g, w - w0> (0 without `grads`) and |w - w0|^2 of each slice, float64 `[num_slices, 2]`."""
        ...

    def adam_(self, moments: Sequence[Moments], numbers: Tensor) -> Tensor:
        """Step every slice as torch's fused Adam does (modified in place), and sum on the way.

        Args:
            moments: one per slice.
            numbers: float64 `[num_slices, len(ADAM_NUMBERS)]`, on the slices' device.

        Returns:
            <f g, d>, |d|^2 before the step and |d|^2 after it, float64 `[num_slices, 3]`; d = w - w0.
        """
        ...

    def pull_(self, s: Tensor) -> None:
        """w <- w - s * (w - w0) (modified in place); where s is 0, or the result not finite, the bits stay.

        Args:
            s: float64 `[num_slices]`, on the slices' device. Half precision is worked on in float32.
        """
        ...


class Backend(Protocol, Hashable):
    """Kernels for one device type. All backends give the same results, except for rounding."""

    name: str

    def takes(self, *tensors: Tensor | None) -> bool:
        """Whether the kernels read and write such tensors: plain, contiguous, of their device and dtypes."""
        ...

    def table(self, slices: Sequence[Slice], last: Table | None = None) -> Table:
        """Slices that are taken (weight, anchor, gradient), ready for work while their memory stays in place.

        `last`: the table of the step before, of which what is still true is used again.
        """
        ...
