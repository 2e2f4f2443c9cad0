"""Adam's step and the sums in one pass: when it is taken, and that it is the same step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_spd import AdamSPD
from sharded_spd.anchors import TensorAnchor
from sharded_spd.kernels.check import check
from sharded_spd.kernels.cpu import CpuKernels, cpu_kernels
from sharded_spd.optim import fused_adam as fused
from sharded_spd.projection.step import Step

LAMBDA = 2.0


class _Counted:
    """The kernel, and how many slices it has stepped."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slices = 0
        step = Step.adam_

        def counted(this: Step, items: Any, moments: Any, numbers: Tensor) -> None:
            self.slices += len(items)
            step(this, items, moments, numbers)

        monkeypatch.setattr(Step, "adam_", counted)


def _params(dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(n).to(dtype)) for n in (1, 17, 70_003)]


def _train(params: list[nn.Parameter], optimizer: AdamSPD, steps: int = 6) -> None:
    torch.manual_seed(1)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("anchor", ["snapshot", "zero", "bfloat16"])
def test_as_the_two_apart(
    dtype: torch.dtype, amsgrad: bool, anchor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's fused Adam with the sums around it: c, r and s of every layer, and the weights."""
    counted = _Counted(monkeypatch)
    found = []
    for kernel in (True, False):
        params = _params(dtype)
        low = {f"{i}": p.detach().bfloat16() for i, p in enumerate(params)}
        source: Any = TensorAnchor(low) if anchor == "bfloat16" else anchor
        named = [(f"{i}", p) for i, p in enumerate(params)]
        optimizer = AdamSPD(named, lr=0.01, weight_decay=LAMBDA, fused=True, amsgrad=amsgrad, anchor=source)
        if not kernel:
            monkeypatch.setattr("sharded_spd.optim.adam.may_fuse", lambda optimizer: False)
        _train(params, optimizer)
        layers = optimizer.projector.metrics()["layers"]
        found.append((params, optimizer, {name: layer for name, layer in layers.items()}))
    assert counted.slices == 3 * 6
    (ours, mine, here), (theirs, other, there) = found
    for name, layer in here.items():
        for key, value in layer.items():
            assert value == pytest.approx(there[name][key], rel=1e-6, abs=1e-9), (name, key)
    for p, q in zip(ours, theirs, strict=True):
        spacing = torch.finfo(dtype).eps * q.detach().double().abs().clamp(min=1e-3)
        assert ((p.detach().double() - q.detach().double()).abs() <= 2 * spacing).all()
        assert mine.state[p]["step"] == other.state[q]["step"] == 6


@pytest.mark.parametrize(
    "settings",
    [
        {"fused": False},
        {"foreach": True},
        {"fused": True, "weight_decay": 0.0},
        {"fused": True, "lr": torch.tensor(0.01)},
        {"fused": True, "rule": "none"},
        {"fused": True, "rule": "decay"},
    ],
)
def test_not_taken(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where something else is asked for, torch steps."""
    counted = _Counted(monkeypatch)
    params = _params(torch.float32)
    _train(params, AdamSPD(params, **{"weight_decay": LAMBDA, **settings}))
    assert counted.slices == 0


def test_part_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that the kernel cannot take is stepped by torch, once."""
    counted = _Counted(monkeypatch)
    params = _params(torch.float32)
    params.append(nn.Parameter(torch.randn(8, 6).t()))  # not contiguous
    groups = [{"params": params[:1], "rule": "none"}, {"params": params[1:]}]
    optimizer = AdamSPD(groups, lr=0.01, weight_decay=LAMBDA, fused=True)
    _train(params, optimizer)
    assert counted.slices == 2 * 6
    assert {float(optimizer.state[p]["step"]) for p in params} == {6.0}


def test_maximize(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sign of the gradient, for Adam as for the condition."""
    found = []
    for sign in (1.0, -1.0):
        params = _params(torch.float32)
        optimizer = AdamSPD(params, lr=0.01, weight_decay=LAMBDA, fused=True, maximize=sign < 0)
        torch.manual_seed(1)
        for _ in range(4):
            for p in params:
                p.grad = sign * torch.randn(p.shape)
            optimizer.step()
        found.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


@pytest.mark.parametrize(("dtype", "taken"), [(torch.float32, 6), (torch.float64, 6), (torch.bfloat16, 0)])
def test_by_default(dtype: torch.dtype, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing said, the kernels step what they step as torch's loop does, but for rounding."""
    counted = _Counted(monkeypatch)
    found = []
    for asked in (None, False):
        params = _params(dtype)
        _train(params, AdamSPD(params, lr=0.01, weight_decay=LAMBDA, fused=asked), steps=2)
        found.append(params)
    assert counted.slices == taken
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)


def test_numbers_on_a_device_are_those_of_the_host() -> None:
    """Where torch keeps the counts of steps beside the parameters, they are not read."""
    group = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}
    counts, owned = torch.tensor([1.0, 1.0, 7.0, 100_000.0]), [1, 2, 1, 3]
    host = fused._on_host(group, counts.tolist(), owned)
    for settings in (group, {**group, "lr": torch.tensor(0.01, dtype=torch.float64)}):
        torch.testing.assert_close(fused._on_device(settings, counts, owned), host, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        fused._on_device(group, counts, [1] * 4), host[[0, 1, 3, 4]], rtol=1e-13, atol=0
    )


def test_a_backend_that_computes_something_else_is_found_out() -> None:
    """Before it is used for the first time."""
    kernels = cpu_kernels()
    assert kernels is not None
    check(kernels, "cpu")

    class Wrong(CpuKernels):
        def table(self, slices: Any, last: Any = None) -> Any:
            return super().table([replace(s, grad_factor=2 * s.grad_factor) for s in slices], last)

    with pytest.raises(RuntimeError, match="cpu kernels give other sums than plain torch"):
        check(Wrong(kernels._library), "cpu")
