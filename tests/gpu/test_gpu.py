"""What only an NVIDIA GPU can show: parity there, and steps in which the host never waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sharded_spd import AdamSPD, SPDConfig, attach
from sharded_spd.config import AnchorConfig
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


def big(seed: int) -> dict[str, torch.Tensor]:
    """Layers of several pieces of the prefetch, and small ones between."""
    generator = torch.Generator(device=GPU).manual_seed(seed)
    shapes = {"a": (3, 1 << 20), "b": (7,), "c": (1 << 21,), "d": (64, 33)}
    return {name: torch.randn(shape, generator=generator, device=GPU) for name, shape in shapes.items()}


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["spd", "l2sp"])
def test_prefetched_anchors(tmp_path: Path, rule: str, stored: torch.dtype) -> None:
    """`device: cpu` and `disk` are bit-equal to `auto`; cpu copies ahead without the host ever waiting."""
    path = tmp_path / "base.safetensors"
    save_file({name: w.to("cpu", stored) for name, w in big(3).items()}, path)
    drawn = [big(100 + t) for t in range(6)]
    found = {}
    for device in ("auto", "cpu", "disk"):
        model = Probe(big(0))
        params = dict(model.named_parameters())
        optimizer = torch.optim.Adam(params.values(), lr=LR, foreach=True)
        anchor = AnchorConfig(source=str(path), device=device)  # type: ignore[arg-type]
        projector = attach(optimizer, model, SPDConfig(rule=rule, weight_decay=LAMBDA, anchor=anchor))
        pulled = 0
        for t, grads in enumerate(drawn):
            give(params, grads)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if t >= 2 and device != "disk" else "default")
            optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
            pulled += sum(layer["s"] > 0 for layer in projector.metrics()["layers"].values())
        assert pulled >= 3
        found[device] = values(params)
        if device == "cpu":
            held = [anchor.values for anchor in projector.export_anchors().values()]
            assert all(isinstance(v, torch.Tensor) and v.is_pinned() for v in held)
    for device in ("cpu", "disk"):
        for name, want in found["auto"].items():
            assert torch.equal(found[device][name], want), f"{device}: {name}"


def test_prefetch_overlaps_on_a_busy_device() -> None:
    """Buffers are used again and again while the device is far behind the host: nothing is overwritten."""
    from sharded_spd.projection.prefetch import ahead

    count = 1 << 23
    host = [torch.full((count,), float(i)).pin_memory() for i in range(8)]
    totals = torch.zeros(8, dtype=torch.float64, device=GPU)
    square = torch.randn(4096, 4096, device=GPU)
    for _ in range(3):
        totals.zero_()
        for i, near in enumerate(ahead([(tensor, totals.device) for tensor in host])):
            assert near is not None
            for begin in range(0, count, 1 << 16):
                square = torch.mm(square, square).clamp(-1, 1) if begin % (1 << 20) == 0 else square
                totals[i] += near[begin : begin + (1 << 16)].double().sum()
    assert totals.tolist() == [i * float(count) for i in range(8)]
