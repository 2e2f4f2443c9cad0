"""Adding a rule: `ball.py` is all that a newcomer writes, and it works wherever a rule may be named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sharded_spd import AdamSPD, attach, load_config
from tests.exercises.ball import Ball
from tests.support.compare import assert_float64_parity
from tests.support.engines import Engine
from tests.support.launch import Task
from tests.support.local import gradients, layers
from tests.support.models import Probe

LR, RADIUS, STEPS = 0.02, 0.05, 6
GUIDE = Path(__file__).parents[2] / "docs" / "rules.md"


def _by_instance(model: nn.Module) -> Optimizer:
    return AdamSPD(model.named_parameters(), lr=LR, weight_decay=1.0, rule=Ball(radius=RADIUS))


def _by_name(model: nn.Module) -> Optimizer:
    """With the radius that the rule has by itself."""
    group = {"params": list(model.named_parameters()), "rule": "ball"}
    return AdamSPD([group], lr=LR, weight_decay=1.0)


def _by_configuration(model: nn.Module) -> Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    attach(optimizer, model, load_config({"rule": "ball", "rule_options": {"radius": RADIUS}}))
    return optimizer


def _by_hand(radius: float) -> list[dict[str, Tensor]]:
    """The weights after each step: torch's Adam, and then what lies outside of the ball is put on it."""
    start = layers()
    params = {name: nn.Parameter(w.clone()) for name, w in start.items()}
    adam, weights, reached = torch.optim.Adam(params.values(), lr=LR), [], 0
    for grads in gradients(STEPS):
        for name, param in params.items():
            param.grad = grads[name].clone()
        adam.step()
        with torch.no_grad():
            for name, param in params.items():
                away = param - start[name]
                if away.norm() > radius:
                    param.copy_(start[name] + radius * away / away.norm())
                    reached += 1
        weights.append({name: param.detach().clone() for name, param in params.items()})
    assert reached >= STEPS, f"the ball is reached only {reached} times and shows nothing"
    return weights


def follows_the_hand(engine: Engine, *, make: Callable[[nn.Module], Optimizer], radius: float) -> None:
    """On any engine: the rule has no line for one."""
    model = engine.wrap(Probe(layers()))
    optimizer = make(model)
    for grads, weights in zip(gradients(STEPS), _by_hand(radius), strict=True):
        optimizer.zero_grad()
        model(grads).backward()
        optimizer.step()
        assert_float64_parity(engine.weights(engine.named(model)), weights)


TASKS = [
    Task(f"ball{make.__name__}", *cell, follows_the_hand, {"make": make, "radius": radius})
    for cell in (("single", 1), ("fsdp2", 2))
    for make, radius in ((_by_instance, RADIUS), (_by_name, Ball().radius), (_by_configuration, RADIUS))
]


@pytest.mark.parametrize("task", [pytest.param(task, marks=task.marks, id=task.id) for task in TASKS])
def test_it_equals_the_hand_computation(task: Task, distributed: Callable[[Task], None]) -> None:
    distributed(task)


def test_the_guide_has_the_same_rule() -> None:
    block = next(b for b in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S) if "class Ball" in b)
    model = Probe(layers())
    found = {"AdamSPD": AdamSPD, "model": model, "__name__": __name__}
    exec(block, found)
    other = Probe(layers())
    optimizer = AdamSPD(other.named_parameters(), rule=Ball(radius=0.5), weight_decay=1.0, lr=1e-3)
    for stepped, of in ((found["optimizer"], model), (optimizer, other)):
        stepped.param_groups[0]["lr"] = 1.0  # so that the ball is left
        of(gradients(1)[0]).backward()
        stepped.step()
    assert_float64_parity(
        {n: p.detach() for n, p in model.named_parameters()},
        {n: p.detach() for n, p in other.named_parameters()},
    )
    assert all((p - layers()[n]).norm() < 0.5 + 1e-9 for n, p in model.named_parameters())
