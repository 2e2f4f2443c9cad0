"""What only an NVIDIA GPU can show: parity there, and steps in which the host never waits for the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sharded_spd import AdamSPD, SPDConfig, attach
from tests.reference.golden import SPD_FILES, read_golden
from tests.reference.oracle import LayerOptions, Oracle
from tests.support.compare import assert_float32_parity, assert_float64_parity
from tests.support.local import LAMBDA, LR, SPD, give, gradients, layers, parameters, values
from tests.support.models import Probe
from tests.support.training import adam_spd_groups

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
GPU = "cuda"


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Raises where the host waits for the device; switched on by the test after its first steps."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("stem", SPD_FILES)
def test_golden(stem: str, dtype: torch.dtype, foreach: bool) -> None:
    """The golden trajectories on the device."""
    ref = read_golden(stem)
    init = {name: w.to(dtype) for name, w in ref.init.items()}
    params = parameters({name: w.to(GPU) for name, w in init.items()})
    groups = adam_spd_groups(params, ref.options)
    for group in groups:
        group["pre"] = [ref.anchors[name].to(GPU, dtype) for name, _ in group["params"]]
    optimizer = AdamSPD(groups, amsgrad=ref.amsgrad, foreach=foreach)
    for t, grads in enumerate(ref.grads):
        give(params, {name: g.to(GPU) for name, g in grads.items()})
        optimizer.step()
        if dtype == torch.float64:
            got = {name: w.cpu() for name, w in values(params).items()}
            assert_float64_parity(got, ref.params[t], label=f"step {t}:")
    got = {name: w.cpu() for name, w in values(params).items()}
    if dtype == torch.float32:
        assert_float32_parity(got, ref.params[-1], init)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("how", ["foreach", "fused", "capturable", "attached", "rules", "scaler"])
def test_steps_never_wait(how: str) -> None:
    """Steps after the first ones, with a scheduler that changes the learning rate."""
    start = {name: w.to(GPU) for name, w in layers(dtype=torch.float32).items()}
    model = Probe(start)
    params = dict(model.named_parameters())
    options = {"fused": how in ("fused", "scaler"), "capturable": how == "capturable"}
    optimizer: torch.optim.Optimizer
    if how == "attached":
        optimizer = torch.optim.AdamW(params.values(), lr=LR, weight_decay=0.0, foreach=True)
        attach(optimizer, model, SPDConfig(weight_decay=LAMBDA))
    elif how == "rules":
        rules = dict(zip(params, ("spd", "l2sp", "decay", "none"), strict=True))
        chosen = {n: LayerOptions(lr=LR, weight_decay=0.5, rule=rule) for n, rule in rules.items()}
        optimizer = AdamSPD(adam_spd_groups(params, chosen))
    else:
        optimizer = AdamSPD(params.items(), lr=LR, weight_decay=LAMBDA, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    if how == "scaler":
        optimizer.grad_scale = torch.full((), 4.0, device=GPU)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.zeros((), device=GPU)  # type: ignore[attr-defined]
    drawn = [{n: g.to(GPU) for n, g in grads.items()} for grads in gradients(8, dtype=torch.float32)]
    torch.cuda.synchronize()
    for t, grads in enumerate(drawn):
        give(params, grads)
        torch.cuda.set_sync_debug_mode("error" if t >= 2 else "default")
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
        scheduler.step()
    assert all(bool(torch.isfinite(p).all()) for p in params.values())


def test_anchor_in_host_memory() -> None:
    """`device: cpu` keeps the anchor in pinned host memory; the result is the same."""
    from sharded_spd.config import AnchorConfig

    start = layers()
    model = Probe({name: w.to(GPU) for name, w in start.items()})
    params = dict(model.named_parameters())
    optimizer = torch.optim.Adam(params.values(), lr=LR)
    attach(optimizer, model, SPDConfig(weight_decay=LAMBDA, anchor=AnchorConfig(device="cpu")))
    oracle = Oracle(start, start, SPD)
    for grads in gradients(8):
        give(params, {name: g.to(GPU) for name, g in grads.items()})
        optimizer.step()
        oracle.step(grads)
    assert_float64_parity({name: w.cpu() for name, w in values(params).items()}, oracle.weights)
