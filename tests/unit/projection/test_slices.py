"""What is kept from step to step: nothing that an engine may move, and nothing that may change unseen."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from sharded_spd import AdamSPD, SPDConfig, attach


def _params() -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(0)
    return [
        (name, nn.Parameter(torch.randn(shape))) for name, shape in (("a", (3, 5)), ("b", (7,)), ("c", ()))
    ]


def _optimizer(kind: str, named: list[tuple[str, nn.Parameter]], **settings: Any) -> torch.optim.Optimizer:
    if kind == "adamspd":
        return AdamSPD(named, lr=0.01, weight_decay=2.0, max_pull=1.0, **settings)
    base = torch.optim.AdamW(named, lr=0.01, weight_decay=0.0)
    attach(base, config=SPDConfig(weight_decay=2.0, max_pull=1.0))
    return base


def _step(named: list[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, p in named:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("kind", ["adamspd", "attach"])
def test_between_steps_nothing_of_the_engine_is_held(kind: str) -> None:
    """Else a model that is moved away, or its gradients, would stay in memory."""
    named = _params()
    optimizer = _optimizer(kind, named)
    for seed in range(2):
        _step(named, optimizer, seed)
    grads = [weakref.ref(p.grad) for _, p in named]
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    assert [ref() for ref in grads] == [None] * 3
    weights = {p.data_ptr(): name for name, p in named}
    tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor]
    others = [weights[t.data_ptr()] for t in tensors if t.numel() and t.data_ptr() in weights]
    assert not others


@pytest.mark.parametrize("kind", ["adamspd", "attach"])
def test_weights_that_have_moved_are_stepped_where_they_are(kind: str) -> None:
    """As after `model.to()`: the same parameters with other memory."""
    found = []
    for moves in (False, True):
        named = _params()
        optimizer = _optimizer(kind, named)
        for seed in range(6):
            _step(named, optimizer, seed)
            if moves:
                for _, p in named:
                    p.data = p.data.clone()
        found.append([p.detach() for _, p in named])
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


def test_scalars_are_read_in_every_step() -> None:
    """Changed in place, and in groups that a loaded checkpoint has put in place of the old ones."""
    found = []
    for reload in (False, True):
        named = _params()
        optimizer = AdamSPD(named, lr=0.01, weight_decay=0.5)
        for seed in range(6):
            if reload:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.param_groups[0]["lr"] = 0.01 * (seed + 1)
            optimizer.param_groups[0]["weight_decay"] = 0.1 * seed
            _step(named, optimizer, seed)
        found.append([p.detach() for _, p in named])
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))
    settings = optimizer.param_groups[0]
    pulls = optimizer.projector.metrics()["layers"]
    assert all(
        layer["s"] == pytest.approx(settings["weight_decay"] * layer["r"] * (layer["c"] < 0), abs=1e-12)
        for layer in pulls.values()
    )


def test_layers_without_a_gradient_come_and_go() -> None:
    """Those of a step are pulled by their own share, whichever the others are."""
    named = _params()
    optimizer = AdamSPD(named, lr=0.05, weight_decay=2.0, max_pull=1.0)
    alone = {name: nn.Parameter(p.detach().clone()) for name, p in named}
    singles = {
        name: AdamSPD([(name, p)], lr=0.05, weight_decay=2.0, max_pull=1.0) for name, p in alone.items()
    }
    generator = torch.Generator().manual_seed(3)
    for step in range(12):
        for i, (name, p) in enumerate(named):
            p.grad = torch.randn(p.shape, generator=generator) if (step >> i) & 1 or step == 0 else None
            alone[name].grad = None if p.grad is None else p.grad.clone()
            singles[name].step()
        optimizer.step()
    assert all(torch.equal(p.detach(), alone[name].detach()) for name, p in named)
