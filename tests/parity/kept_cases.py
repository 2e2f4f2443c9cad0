"""Rules that need the weights from before the step, per layer and per element, over every engine."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sharded_spd.rules import Options, Rule, RuleSpec, Stats
from sharded_spd.rules.statistics import DELTA_SQ, UPDATE_GAIN, Block
from tests.parity.cases import gradients, step, tensors
from tests.reference.oracle import LayerOptions
from tests.support.compare import assert_float64_parity
from tests.support.engines import Engine
from tests.support.training import Form, Training, anchor_file

LR, STRENGTH = 0.02, 0.9


@dataclass(frozen=True, slots=True)
class Gain(Rule):
    """Pulls by lambda times the relative gain in squared deviation, formed free of cancellation."""

    name: ClassVar[str] = "gain"
    spec: ClassVar[RuleSpec] = RuleSpec(after=(UPDATE_GAIN, DELTA_SQ), keeps_w=True)

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """Lambda * (n1^2 - n0^2) / n1^2 where that is positive."""
        return options.weight_decay * (stats.after[UPDATE_GAIN] / stats.after[DELTA_SQ]).clamp(min=0.0)


@dataclass(frozen=True, slots=True)
class CautiousElements(Rule):
    """Pulls by lr * lambda, and only the elements whose update leads away from the anchor."""

    name: ClassVar[str] = "cautious_elements"
    spec: ClassVar[RuleSpec] = RuleSpec(granularity="element", keeps_w=True)

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """Never asked, for s is found per element."""
        raise AssertionError("asked for s per layer")

    def pull_elements(self, block: Block, lr: Tensor, weight_decay: Tensor) -> Tensor:
        """Lr * lambda where u * d > 0."""
        return torch.where(block.update * block.delta > 0, lr * weight_decay, 0.0)


RULES: dict[str, Rule] = {"gain": Gain(), "elements": CautiousElements()}


def _plain(rule: Rule, before: Tensor, tentative: Tensor, anchor: Tensor) -> Tensor:
    """How the rule moves one whole layer."""
    if isinstance(rule, Gain):
        n0, n1 = (before - anchor).norm(), (tentative - anchor).norm()
        return tentative - max(STRENGTH * float((n1**2 - n0**2) / n1**2), 0.0) * (tentative - anchor)
    away = (tentative - before) * (tentative - anchor) > 0
    return torch.where(away, tentative - LR * STRENGTH * (tentative - anchor), tentative)


def kept(engine: Engine, *, form: Form, rule: Rule) -> None:
    """As torch's Adam and the rule written out on whole layers, from an anchor on disk."""
    start, anchors = tensors(), tensors(seed=9)
    options: Any = LayerOptions(lr=LR, weight_decay=STRENGTH, rule=rule)  # type: ignore[arg-type]
    training = Training(engine, start, options, form=form, anchor=anchor_file(engine, anchors))
    params = {name: torch.nn.Parameter(w.clone()) for name, w in start.items()}
    adam = torch.optim.Adam(params.values(), lr=LR)
    moved = 0
    for t, given in enumerate(
        gradients(start, 7, missing={2: ("block.attn.weight",), 4: ("embed.weight", "one")})
    ):
        given = step(training, given)
        before = {name: p.detach().clone() for name, p in params.items()}
        for name, p in params.items():
            p.grad = given.get(name)
        adam.step()
        with torch.no_grad():
            for name in given:
                new = _plain(rule, before[name], params[name], anchors[name])
                moved += not torch.equal(new, params[name])
                params[name].copy_(new)
        assert_float64_parity(
            training.weights(), {n: p.detach() for n, p in params.items()}, label=f"step {t}:"
        )
    assert moved >= 10, f"the rule moved only {moved} layers and shows nothing"
