"""The reference backend: plain torch, chunk by chunk, on any device and dtype."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sharded_spd.anchors.base import Values
from sharded_spd.kernels.base import Moments, Slice, Table
from sharded_spd.rules.statistics import CHUNK, DELTA_SQ, GRAD_DOT_DELTA, Block, Statistic, layer_sums


class ReferenceKernels:
    """Takes everything, including values read in chunks; see `Backend`."""

    name = "reference"

    def takes(self, *tensors: Tensor | None) -> bool:
        """See `Backend`."""
        return True

    def table(self, slices: Sequence[Slice], last: Table | None = None) -> Table:
        """See `Backend`."""
        return ReferenceTable(slices)


class ReferenceTable:
    """See `Table`."""

    def __init__(self, slices: Sequence[Slice]) -> None:
        self._slices = slices

    def sums(self, *, grads: bool) -> Tensor:
        """See `Table`."""
        rows = []
        for s in self._slices:
            wanted: tuple[Statistic, ...] = (
                (GRAD_DOT_DELTA, DELTA_SQ) if grads and s.grad is not None else (DELTA_SQ,)
            )
            found = layer_sums(_blocks(s, grads=len(wanted) > 1), wanted)
            zero = torch.zeros((), dtype=torch.float64, device=s.weight.device)
            rows.append(torch.stack([zero] * (2 - len(found)) + found if found else [zero, zero]))
        return torch.stack(rows) if rows else torch.empty(0, 2, dtype=torch.float64)

    def adam_(self, moments: Sequence[Moments], numbers: Tensor) -> Tensor:
        """See `Table`."""
        before = self.sums(grads=True)
        for s, m, x in zip(self._slices, moments, numbers, strict=True):
            _adam(s, m, x)
        return torch.cat([before, self.sums(grads=False)[:, 1:]], dim=1)

    def pull_(self, s: Tensor) -> None:
        """See `Table`."""
        for own, share in zip(self._slices, s, strict=True):
            pull_(own.flat_weight(), own.anchor, share)


def _blocks(s: Slice, *, grads: bool) -> Iterator[Block]:
    weight, grad = s.flat_weight(), s.flat_grad() if grads else None
    for begin in range(0, s.numel, CHUNK):
        cut = slice(begin, min(begin + CHUNK, s.numel))
        anchor = None if s.anchor is None else s.anchor[cut]
        yield Block(weight[cut], anchor, None if grad is None else grad[cut], s.grad_factor)


def _adam(s: Slice, m: Moments, numbers: Tensor) -> None:
    weight, grad = s.flat_weight(), s.flat_grad()
    if grad is None:
        return
    cut = slice(s.offset, s.offset + s.numel)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rest1, rest2 = (1 - numbers[:2]).to(dtype)
    _, beta2, eps, step_size, root = numbers.to(dtype)
    grad = grad.to(dtype) * s.grad_factor
    kept = [t.view(-1)[cut] for t in (m.exp_avg, m.exp_avg_sq)]
    mean, square = (t.to(dtype) for t in kept)
    mean = torch.lerp(mean, grad, rest1)
    square = beta2 * square + rest2 * grad * grad
    second = square
    if m.max_exp_avg_sq is not None:
        most = m.max_exp_avg_sq.view(-1)[cut]
        second = torch.maximum(most.to(dtype), square)
        most.copy_(second)
    weight.copy_(weight.to(dtype) - step_size * mean / (second.sqrt() / root + eps))
    # Rounded after their use: in float16 the second one would vanish before it.
    for old, new in zip(kept, (mean, square), strict=True):
        old.copy_(new)


def _pull_chunk(weight: Tensor, anchor: Tensor | None, s: Tensor) -> Tensor:
    # Half precision is computed in float32, so that s is not rounded to 8 bits first.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    w, s = weight.to(dtype), s.to(dtype)
    if anchor is None:
        pulled = w * (1 - s)
    else:
        pulled = torch.lerp(w, anchor.to(device=w.device, dtype=dtype, non_blocking=True), s)
    return pulled.to(weight.dtype)


@torch.no_grad()
def pull_(weight: Tensor, anchor: Values | None, s: Tensor) -> None:
    """w <- w - s * (w - w0) (modified in place); where s is 0, or the result not finite, the bits stay.

    Args:
        weight: 1-D, the slice.
        anchor: 1-D values of the slice; None for zero.
        s: float64, 0-d for the whole slice, or one value per element.
    """
    on_host = s.device.type == "cpu" and s.dim() == 0
    if on_host and s == 0:  # reading a CPU tensor waits for nothing
        return
    for begin in range(0, weight.numel(), CHUNK):
        end = begin + CHUNK
        part = weight[begin:end]
        s_part = s if s.dim() == 0 else s[begin:end]
        pulled = _pull_chunk(part, None if anchor is None else anchor[begin:end], s_part)
        # An infinite weight has no way back: lerp makes it NaN.
        part.copy_(torch.where((s_part != 0) & torch.isfinite(pulled), pulled, part))


def pull_back_(weight: Tensor, by: Tensor) -> None:
    """w <- w - by, float64 (modified in place); where it is 0, or the result not finite, the bits stay."""
    pulled = (weight.double() - by).to(weight.dtype)
    weight.copy_(torch.where((by != 0) & torch.isfinite(pulled), pulled, weight))
