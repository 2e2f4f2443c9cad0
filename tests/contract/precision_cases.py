"""How exact the ratio is on a layer of ten million elements, however it is split."""

from __future__ import annotations

import torch
from torch import Tensor

from sharded_spd import AdamSPD
from tests.support.engines import Engine
from tests.support.models import Probe

ELEMENTS = 10_000_000
BLOCK = 1 << 16


def exact_ratio(before: Tensor, after: Tensor, anchor: Tensor) -> float:
    """(n1 - n0) / n1 from `A = sum u * (2d + u)`, in float64 and free of cancellation."""
    gain = square0 = square1 = 0.0
    for begin in range(0, before.numel(), BLOCK):
        cut = slice(begin, begin + BLOCK)
        w, a = before[cut].double(), anchor[cut].double()
        d, u = w - a, after[cut].double() - w
        gain += float((u * (2 * d + u)).sum())
        square0 += float((d * d).sum())
        square1 += float(((d + u) ** 2).sum())
    n0, n1 = square0**0.5, square1**0.5
    return gain / (n1 * (n1 + n0))


def ratio_of_a_large_layer(engine: Engine, *, dtype: torch.dtype, lr: float) -> None:
    """|r - r_exact| <= 1e-5 r + 1e-9: a difference of two norms that agree in their first digits."""
    rows = 10
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(rows, ELEMENTS // rows, generator=generator).to(dtype)
    grad = (-0.01 * start.float()).to(dtype)
    grad[0, 0] = (
        1e6 * start[0, 0].sign()
    )  # turns <g, d> round, while Adam still moves outward everywhere else
    model = engine.wrap(Probe({"weight": start}))
    params = engine.named(model)
    optimizer = AdamSPD(params.items(), lr=lr, weight_decay=0.5, anchor="zero", foreach=False)
    model({"weight": grad}).backward()
    optimizer.step()
    got = optimizer.projector.metrics()["layers"]["weight"]

    plain = torch.nn.Parameter(start.clone())
    plain.grad = grad
    reference = torch.optim.Adam([plain], lr=lr, foreach=False)
    reference.step()
    want = exact_ratio(start.view(-1), plain.detach().view(-1), torch.zeros(1).expand(ELEMENTS))
    assert got["c"] < 0
    assert 0 < want < 0.2, f"r = {want} shows nothing"
    assert abs(got["r"] - want) <= 1e-5 * want + 1e-9, f"r = {got['r']!r}, exact {want!r}"
    assert abs(got["s"] - 0.5 * want) <= 1e-5 * want + 1e-9
