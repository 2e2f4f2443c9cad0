"""The seam for rules: statistics per row, a gradient edit, state of layers and of shards, on any layout."""

from __future__ import annotations

import copy
from typing import Any

import torch

from tests.parity.cases import SPD, follow, gradients, tensors
from tests.parity.resume_cases import reload_everywhere
from tests.reference.oracle import LayerOptions, Oracle
from tests.support.collectives import Collectives
from tests.support.compare import assert_bits_equal, assert_float64_parity
from tests.support.engines import Engine
from tests.support.toy_rules import RowBall, RowBallOracle, TurnBack, TurnBackOracle
from tests.support.training import Form, Training

TOYS: dict[str, Any] = {
    "row_ball": (RowBall, RowBallOracle, 0.7),
    "turn_back": (TurnBack, TurnBackOracle, 1.0),
}
"""Rule, oracle, lambda."""


def _options(toy: str) -> LayerOptions:
    rule, _, strength = TOYS[toy]
    return LayerOptions(lr=0.02, weight_decay=strength, rule=rule())


def toy_rule(engine: Engine, *, form: Form, toy: str) -> None:
    """As the plain form does on whole tensors, also in steps without some gradients."""
    start, options = tensors(), _options(toy)
    training = Training(engine, start, options, form=form)
    oracle = TOYS[toy][1](start, start, options)
    missing = {3: ("block.attn.weight", "one"), 5: ("embed.weight",)}
    follow(training, oracle, gradients(start, 12, missing=missing))


def toy_beside_spd(engine: Engine, *, form: Form, toy: str) -> None:
    """Different rules in one optimizer settle in the same collectives."""
    start, own = tensors(), _options(toy)
    names = list(start)
    options = {name: own if i % 2 else SPD for i, name in enumerate(names)}
    training = Training(engine, start, options, form=form)
    toys = TOYS[toy][1]({n: start[n] for n in names[1::2]}, start, own)
    plain = Oracle({n: start[n] for n in names[::2]}, start, SPD)
    for t, grads in enumerate(gradients(start, 8)):
        training.step(grads)
        toys.step({n: grads[n] for n in toys.weights})
        plain.step({n: grads[n] for n in plain.weights})
        if t % 3 == 1 or t == 7:
            assert_float64_parity(training.weights(), {**toys.weights, **plain.weights}, label=f"step {t}:")


def toy_collectives(engine: Engine, *, form: Form, toy: str, beside: bool, expected: int) -> None:
    """One all-reduce per scope and step; a rule that edits the gradient adds one, ahead of it.

    `beside`: every other layer has SPD, which asks for statistics after the step.
    """
    start, own = tensors(), _options(toy)
    options = {name: SPD if beside and i % 2 else own for i, name in enumerate(start)}
    training = Training(engine, start, options, form=form)
    rows = sum(w.shape[0] if w.ndim > 1 else 1 for w in start.values())
    for t, grads in enumerate(gradients(start, 4)):
        training.backward(grads)
        with Collectives() as seen:
            training.optimizer.step()
        training.optimizer.zero_grad()
        training.steps += 1
        if t >= 2:
            assert [op for op, _ in seen.direct] == ["allreduce_"] * expected, f"got {seen.direct}"
            assert all(numel <= 8 * len(start) + 2 * rows for _, numel in seen.direct), f"got {seen.direct}"


def toy_resumes(engine: Engine, *, form: Form, toy: str) -> None:
    """Layer and shard state are part of the checkpoint: the same bits."""
    start, options = tensors(), _options(toy)
    first = Training(engine, start, options, form=form)
    grads = gradients(start, 9)
    for given in grads[:4]:
        first.step(given)
    weights = {name: p.detach().clone() for name, p in first.params.items()}
    saved, own = copy.deepcopy(first.optimizer.state_dict()), copy.deepcopy(first.projector.state_dict())
    second = Training(engine, start, options, form=form)
    with torch.no_grad():
        for name, p in second.params.items():
            p.copy_(weights[name])
    second.optimizer.load_state_dict(saved)
    second.projector.load_state_dict(own)
    second.steps = first.steps
    for given in grads[4:]:
        first.step(given)
        second.step(given)
        assert_bits_equal(second.weights(), first.weights())


def toy_resharded(engine: Engine, *, form: Form, toy: str) -> None:
    """torch.distributed.checkpoint: saved on four ranks, loaded on four, two and one, with the state."""
    start, options = tensors(), _options(toy)
    reload_everywhere(engine, start, options, TOYS[toy][1](start, start, options), form=form)
