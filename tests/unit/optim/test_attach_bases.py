"""`attach` on the optimizers of torch: the rule around each is the rule around a second instance of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_spd import SPDConfig, attach
from sharded_spd.config import LayerConfig
from tests.reference.oracle import BaseOracle, LayerOptions
from tests.support.compare import assert_bits_equal, assert_layers_close
from tests.support.local import LAMBDA, LR, SPD, follow, give, gradients, layers, values
from tests.support.models import Probe

Params = Mapping[str, nn.Parameter]


class Rebinds(torch.optim.SGD):
    """Puts new memory in place of the old, as bitsandbytes does for what is not contiguous."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = p.data - group["lr"] * p.grad
        return loss


BASES: dict[str, Callable[[Params], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p.values(), lr=LR),
    "SGD-momentum": lambda p: torch.optim.SGD(p.values(), lr=LR, momentum=0.9),
    "SGD-nesterov-foreach": lambda p: torch.optim.SGD(
        p.values(), lr=LR, momentum=0.9, nesterov=True, foreach=True
    ),
    "Adam": lambda p: torch.optim.Adam(p.values(), lr=LR, foreach=False),
    "Adam-foreach": lambda p: torch.optim.Adam(p.values(), lr=LR, foreach=True),
    "Adam-fused": lambda p: torch.optim.Adam(p.values(), lr=LR, fused=True),
    "Adam-named": lambda p: torch.optim.Adam(p.items(), lr=LR),
    "AdamW": lambda p: torch.optim.AdamW(p.values(), lr=LR, weight_decay=0.0, foreach=False),
    "AdamW-foreach": lambda p: torch.optim.AdamW(p.values(), lr=LR, weight_decay=0.0, foreach=True),
    "AdamW-fused": lambda p: torch.optim.AdamW(p.values(), lr=LR, weight_decay=0.0, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p.values(), lr=LR, weight_decay=0.0),
    "RMSprop": lambda p: torch.optim.RMSprop(p.values(), lr=LR, momentum=0.5, centered=True),
    "NAdam": lambda p: torch.optim.NAdam(p.values(), lr=LR),
    "Adagrad": lambda p: torch.optim.Adagrad(p.values(), lr=LR),
    "SGD-rebinds": lambda p: Rebinds(p.values(), lr=LR),
    "Rprop": lambda p: torch.optim.Rprop(p.values(), lr=LR),
}


def _closure(
    model: Probe, optimizer: torch.optim.Optimizer, grads: Mapping[str, Tensor]
) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(dict(grads))
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("base", BASES)
def test_base(base: str) -> None:
    start = layers()
    model = Probe(start)
    params = dict(model.named_parameters())
    optimizer = BASES[base](params)
    attach(optimizer, model, SPDConfig(weight_decay=LAMBDA))
    follow(optimizer, params, BaseOracle(start, start, SPD, BASES[base]), gradients(10))


@pytest.mark.parametrize("base", BASES)
def test_base_with_closure(base: str) -> None:
    """The gradients exist only when the closure returns; what it returns is the step's result."""
    start = layers()
    model = Probe(start)
    params = dict(model.named_parameters())
    optimizer = BASES[base](params)
    attach(optimizer, model, SPDConfig(weight_decay=LAMBDA))
    oracle, pulled = BaseOracle(start, start, SPD, BASES[base]), 0
    for t, given in enumerate(gradients(8)):
        want = float(sum((params[n].detach() * g).sum() for n, g in given.items()))
        closure = _closure(model, optimizer, given)
        loss = optimizer.step(closure) if t % 2 else optimizer.step(closure=closure)
        assert isinstance(loss, Tensor)
        assert loss.item() == pytest.approx(want, rel=1e-9)
        pulled += sum(stats.s > 0 for stats in oracle.step(given).values())
        assert_layers_close(values(params), oracle.weights, relative=1e-10, label=f"step {t}:")
    assert pulled >= 3


def test_muon() -> None:
    """Muon takes matrices only; the others of the model go to a second optimizer that has no rule."""
    start = {name: w for name, w in layers(dtype=torch.float32).items() if w.ndim == 2}
    model = Probe(start)
    params = dict(model.named_parameters())

    def make(p: Params) -> torch.optim.Optimizer:
        return torch.optim.Muon(p.values(), lr=LR, weight_decay=0.0)

    optimizer = make(params)
    attach(optimizer, model, SPDConfig(weight_decay=LAMBDA))
    oracle = BaseOracle(start, start, SPD, make)
    grads = [{n: g[n] for n in start} for g in gradients(10, dtype=torch.float32)]
    follow(optimizer, params, oracle, grads, relative=2e-6)


def test_several_optimizers_over_one_model() -> None:
    start = layers()
    model = Probe(start)
    params = dict(model.named_parameters())
    parts = [dict(list(params.items())[:2]), dict(list(params.items())[2:])]
    optimizers = [BASES["SGD-momentum"](parts[0]), BASES["Adam"](parts[1])]
    projector = attach(optimizers, model, SPDConfig(weight_decay=LAMBDA))
    oracles = [
        BaseOracle({n: start[n] for n in parts[0]}, start, SPD, BASES["SGD-momentum"]),
        BaseOracle({n: start[n] for n in parts[1]}, start, SPD, BASES["Adam"]),
    ]
    pulled = 0
    for given in gradients(10):
        give(params, given)
        for optimizer in optimizers:
            optimizer.step()
        want: dict[str, Tensor] = {}
        for oracle in oracles:
            stats = oracle.step({n: given[n] for n in oracle.params})
            pulled += sum(s.s > 0 for s in stats.values())
            want.update(oracle.weights)
        assert_layers_close(values(params), want, relative=1e-10)
        assert projector.metrics()["num_layers"] == 4
    assert pulled >= 3


def test_detach_gives_the_plain_base_back() -> None:
    start = layers()
    model = Probe(start)
    params = dict(model.named_parameters())
    optimizer = BASES["Adam"](params)
    projector = attach(optimizer, model, SPDConfig(weight_decay=LAMBDA))
    oracle = BaseOracle(start, start, SPD, BASES["Adam"])
    grads = gradients(12)
    follow(optimizer, params, oracle, grads[:6])
    projector.detach()
    oracle.options = LayerOptions(lr=LR)
    follow(optimizer, params, oracle, grads[6:], pulls=False)
    attach(optimizer, model, SPDConfig(weight_decay=0.5))


def test_attaching_twice_raises() -> None:
    """Two projectors would pull twice."""
    model = Probe(layers())
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    attach(optimizer, model, SPDConfig(weight_decay=LAMBDA))
    with pytest.raises((ValueError, TypeError, RuntimeError), match=r"detach\(\)"):
        attach(optimizer, model, SPDConfig(weight_decay=LAMBDA))


def test_lbfgs_raises() -> None:
    """A base that evaluates its closure several times has no single gradient to judge by."""
    model = Probe(layers())
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum(((p - 1) ** 2).sum() for p in model.parameters())
        loss.backward()  # type: ignore[union-attr]
        return loss  # type: ignore[return-value]

    with pytest.raises((TypeError, RuntimeError, ValueError), match="closure"):  # noqa: PT012 (either may refuse)
        attach(optimizer, model, SPDConfig(weight_decay=LAMBDA))
        optimizer.step(closure)


@pytest.mark.parametrize("foreach", [False, True])
def test_decay_is_torch_adamw(foreach: bool) -> None:
    start = layers()
    model, other = Probe(start), Probe(start)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, foreach=foreach)
    attach(optimizer, model, SPDConfig(rule="decay", weight_decay=0.1))
    reference = torch.optim.AdamW(other.parameters(), lr=LR, weight_decay=0.1, foreach=foreach)
    for given in gradients(100):
        give(dict(model.named_parameters()), given)
        give(dict(other.named_parameters()), given)
        optimizer.step()
        reference.step()
    assert_layers_close(
        values(dict(model.named_parameters())), values(dict(other.named_parameters())), relative=1e-12
    )


def test_decay_is_sgd_with_decoupled_decay() -> None:
    """Applied before the base step whatever the base is."""
    start = layers()
    model = Probe(start)
    params = dict(model.named_parameters())
    optimizer = torch.optim.SGD(params.values(), lr=LR)
    attach(optimizer, model, SPDConfig(rule="decay", weight_decay=0.1))
    want = {name: w.clone() for name, w in start.items()}
    for given in gradients(20):
        give(params, given)
        optimizer.step()
        want = {name: w * (1 - LR * 0.1) - LR * given[name] for name, w in want.items()}
    assert_layers_close(values(params), want, relative=1e-12)


def test_strength_zero_is_the_base_to_the_last_bit() -> None:
    for base, make in BASES.items():
        start = layers(dtype=torch.float32)
        model, other = Probe(start), Probe(start)
        ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
        optimizer, reference = make(ours), make(theirs)
        config = SPDConfig(
            weight_decay=0.0, layers=(LayerConfig(pattern="norm.*", rule="none", weight_decay=3.0),)
        )
        attach(optimizer, model, config)
        for given in gradients(6, dtype=torch.float32):
            give(ours, given)
            give(theirs, given)
            optimizer.step()
            reference.step()
        assert_bits_equal(values(ours), values(theirs), label=base)


def test_base_that_returns_gradients_to_the_scaler() -> None:
    """A fused base divides by the scale itself: the statistics have to, too."""
    start = layers(dtype=torch.float32)
    model = Probe(start)
    params = dict(model.named_parameters())
    optimizer = BASES["AdamW-fused"](params)
    attach(optimizer, model, SPDConfig(weight_decay=LAMBDA))
    oracle = BaseOracle(start, start, SPD, BASES["AdamW-fused"])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    pulled = 0
    for t, given in enumerate(gradients(10, dtype=torch.float32)):
        before = values(params)
        bad: dict[str, Any] = dict(given)
        if t == 3:
            bad["body.bias"] = torch.full_like(given["body.bias"], torch.inf)
        scaler.scale(model(bad)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if t == 3:
            assert_bits_equal(values(params), before)
            continue
        pulled += sum(stats.s > 0 for stats in oracle.step(given).values())
        assert_layers_close(values(params), oracle.weights, relative=2e-6, label=f"step {t}:")
    assert pulled >= 2
