"""Tables of slices of every kind, and what two backends make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sharded_spd.kernels.base import Backend, Moments, Slice, Table

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class Work:
    """Slices with their moments, Adam's numbers and shares to pull by."""

    slices: list[Slice]
    moments: list[Moments]
    numbers: Tensor
    shares: Tensor

    def copy(self) -> Work:
        """The same numbers in memory of their own."""
        slices = [replace(s, weight=s.weight.clone()) for s in self.slices]
        moments = [Moments(*(t.clone() for t in m.tensors if t is not None)) for m in self.moments]
        return Work(slices, moments, self.numbers, self.shares)


def mixed_work(
    numels: Sequence[int],
    *,
    seed: int,
    amsgrad: bool = False,
    device: str = "cpu",
    weights: Sequence[torch.dtype] = DTYPES,
) -> Work:
    """Slices of `numels` elements, whose dtypes, offsets, anchors, gradients and factors are drawn."""
    generator = torch.Generator().manual_seed(seed)

    def pick(choices: Sequence[object]) -> object:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    def some(numel: int, dtype: object) -> Tensor:
        return torch.randn(numel, generator=generator).to(device, dtype)  # type: ignore[call-overload]

    slices, moments, rows, shares = [], [], [], []
    for i, numel in enumerate(numels):
        dtype, offset = weights[i % len(weights)], pick((0, 0, 1, 3, 8))
        assert isinstance(offset, int)
        whole = numel + offset + 2
        weight, grad = some(whole, dtype), some(whole, pick((dtype, *DTYPES)))
        near = weight[offset : offset + numel].float() + 0.1 * some(numel, torch.float32)
        anchor = pick((None, near.to(dtype), near, near.bfloat16(), near.double()))
        assert anchor is None or isinstance(anchor, Tensor)
        factor = pick((1.0, -1.0, 0.37, torch.tensor(-0.5, device=device, dtype=torch.float64)))
        assert isinstance(factor, float | Tensor)
        slices.append(Slice(weight, offset, numel, anchor, pick((grad, grad, grad, None)), factor))  # type: ignore[arg-type]
        kept = pick((dtype, dtype, torch.float32))
        state = [some(whole, kept).abs() for _ in range(3 if amsgrad else 2)]
        moments.append(Moments(*state))
        beta1 = pick((0.9, 0.9, 0.3))
        rows.append([beta1, 0.99, 1e-8, 0.01, 0.3])
        shares.append(pick((0.0, 1e-7, 0.25, 0.5, 1.0, 3.0)))
    return Work(
        slices,
        moments,
        torch.tensor(rows, dtype=torch.float64, device=device).view(-1, 5),
        torch.tensor(shares, dtype=torch.float64, device=device),
    )


def cycle(table: Table, work: Work) -> list[Tensor]:
    """All that is done with a table in a step, in its order: the three results that are not in place."""
    first = table.sums(grads=True)
    stepped = table.adam_(work.moments, work.numbers)
    then = table.sums(grads=False)
    table.pull_(work.shares)
    return [first, stepped, then]


def assert_close_in_ulp(ours: Tensor, theirs: Tensor, *, scale: Tensor | float = 0.0) -> None:
    """Within 2 units in the last place of the value, or of its terms' `scale` where that is larger."""
    info = torch.finfo(theirs.dtype)
    size = torch.maximum(
        theirs.double().abs(), torch.as_tensor(scale, dtype=torch.float64, device=theirs.device)
    )
    # Subnormal numbers lie eps * tiny apart.
    spacing = info.eps * size.clamp(min=info.tiny)
    same = (ours.isnan() & theirs.isnan()) | (ours == theirs)
    off = (ours.double() - theirs.double()).abs() / spacing
    assert (same | (off <= 2)).all(), f"{theirs.dtype}: {off[~same].max():.3g} units in the last place"


def assert_same_sums(ours: Tensor, theirs: Tensor, slices: Sequence[Slice], *, rtol: float) -> None:
    """Float64 sums, each within `rtol` of the sum of its terms' sizes; what is not finite is so in both."""
    for mine, want, s in zip(ours, theirs, slices, strict=True):
        grad = s.flat_grad()
        terms = [want[1:], *([] if grad is None else [grad.double().square().nan_to_num(0.0, 0.0).sum()])]
        size = sum(t.nan_to_num(0.0, 0.0).abs().max() for t in terms) + 1e-30
        assert ((mine - want).abs().nan_to_num(nan=0.0) <= rtol * size).all(), f"{mine} {want}"
        assert torch.equal(mine.isfinite(), want.isfinite())


def assert_same_work(ours: Backend, theirs: Backend, work: Work) -> None:
    """Both backends put a copy of `work` through a cycle: float64 sums, and weights within 2 ulp."""
    mine, other = work.copy(), work.copy()
    assert all(ours.takes(s.weight, s.anchor, s.grad) for s in mine.slices)  # type: ignore[arg-type]
    found = cycle(ours.table(mine.slices), mine)
    wanted = cycle(theirs.table(other.slices), other)
    assert_same_sums(found[0], wanted[0], work.slices, rtol=1e-13)
    assert_same_sums(found[1][:, :2], found[0], work.slices, rtol=1e-13)
    assert_same_sums(
        found[2],
        torch.stack([torch.zeros_like(found[1][:, 0]), found[1][:, 2]], dim=1),
        work.slices,
        rtol=1e-13,
    )
    # What comes after the step is of rounded weights, each of which may be off by 2 units in its last place.
    for f, w, s in zip(found[1], wanted[1], work.slices, strict=True):
        bound = 8 * torch.finfo(s.weight.dtype).eps * (w[2] + s.numel)
        assert (f[2] - w[2]).abs() <= bound or (f[2].isnan() and w[2].isnan()), f"{f} {w}"
    for a, b, old, share in zip(mine.slices, other.slices, work.slices, work.shares.tolist(), strict=True):
        # A pull beyond the anchor multiplies what the step's rounding has left between the two.
        scale = old.weight.double().abs().clamp(min=1e-2) * (4 if share > 1 else 1)
        assert_close_in_ulp(a.weight, b.weight, scale=scale)
        cut = slice(old.offset, old.offset + old.numel)
        outside = torch.ones(old.weight.numel(), dtype=torch.bool, device=old.weight.device)
        outside[cut] = False
        assert torch.equal(a.weight[outside], old.weight[outside])
    for m, n, old in zip(mine.moments, other.moments, work.moments, strict=True):
        assert_close_in_ulp(m.exp_avg, n.exp_avg, scale=old.exp_avg.double().abs() + 1)
        assert_close_in_ulp(m.exp_avg_sq, n.exp_avg_sq)
        if m.max_exp_avg_sq is not None and n.max_exp_avg_sq is not None:
            assert_close_in_ulp(m.max_exp_avg_sq, n.max_exp_avg_sq)
