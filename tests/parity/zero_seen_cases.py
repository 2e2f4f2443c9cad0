"""DeepSpeed with gradients that every rank rounds for itself: the oracle is fed what the base was handed."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sharded_spd import attach
from tests.parity.cases import SHAPES, SPD, gradients
from tests.parity.zero_cases import GROUPS
from tests.reference.oracle import LayerOptions, Oracle
from tests.support.engines import Engine
from tests.support.training import config_of
from tests.support.zero import Setting, ZeroTraining
from tests.support.zero_seen import SeenGradients, distinct

STEPS = 10


def agrees_with_what_arrives(
    engine: Engine,
    *,
    setting: Setting,
    grouped: bool = False,
    per_step: bool = False,
    scale: float = 1.0,
) -> None:
    """Masters within 5e-6 of the oracle's, and within 1 % of what the rule did to them.

    Every rank and micro-step has gradients of its own; `scale` enlarges them.
    """
    start = distinct(SHAPES, setting.torch_dtype)
    options = {name: GROUPS[name] if grouped else SPD for name in start}
    training = ZeroTraining(start, options, setting, attached=False)
    seen = SeenGradients(training.base, start)
    training.projector = attach(
        training.engine,
        config=replace(config_of(options), reduction="per_step" if per_step else "per_inner_step"),
    )
    oracle = Oracle(start, start, options)
    plain = Oracle(start, start, {n: replace(o, rule="none") for n, o in options.items()})
    norms = []
    for t in range(STEPS):
        _backward(training, engine.rank, t, scale)
        given = seen.take()
        assert given is not None, f"step {t} was skipped"
        norms.append(float(torch.cat([g.double().reshape(-1) for g in given.values()]).norm()))
        oracle.step(given)
        plain.step(given)
    if setting.clip:
        assert max(norms) <= setting.clip * 1.001, f"clipping at {setting.clip} did not bite: {norms}"
    assert training.projector.num_steps == STEPS
    masters = seen.masters()
    assert_within_effect(masters, oracle.weights, plain.weights, options)
    assert_computes_with(training, masters)
    training.close()


def _backward(training: ZeroTraining, rank: int, t: int, scale: float) -> None:
    """Backward and step, with random gradients of this rank and of each micro-step."""
    like = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    count = training.setting.accumulate
    drawn = gradients(like, STEPS * count * 4)[(t * 4 + rank) * count :]
    for grads in drawn[:count]:
        sent = {name: (g * scale).to(training.setting.torch_dtype) for name, g in grads.items()}
        training.engine.backward(training.engine(sent).float())
        training.engine.step()


def assert_computes_with(training: ZeroTraining, masters: Mapping[str, Tensor]) -> None:
    """The model has these weights, rounded, on every rank."""
    import deepspeed

    whole = training.setting.stage == 3
    for name, p in training.engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=whole):
            assert torch.equal(p.detach(), masters[name].to(p.dtype)), name


def assert_within_effect(
    got: Mapping[str, Tensor],
    want: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    options: Mapping[str, LayerOptions],
) -> None:
    """Norm-wise per layer 5e-6 of the weights, and 1 % of the distance to the run without a rule."""
    bad, shown = [], 0
    for name, reference in want.items():
        error = float((got[name].double() - reference).norm())
        effect = float((reference - plain[name]).norm())
        limit = 5e-6 * float(reference.norm())
        if effect > 0:
            limit = min(limit, 0.01 * effect)
            shown += options[name].rule != "none"
        if not error <= limit:
            bad.append(f"{name}: |x - ref| = {error:.3e} > {limit:.3e} (the rule's effect is {effect:.3e})")
    assert not bad, "\n".join(bad)
    assert shown >= 3, f"the rule shows in {shown} layers only"


def kernel_base(engine: Engine, *, setting: Setting, kind: str) -> None:
    """The base that DeepSpeed makes of "AdamW" in the JSON, with a kernel of its own."""
    # torch looks for ninja even where the kernel is compiled already
    os.environ["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    params: dict[str, Any] = {"lr": SPD.lr, "weight_decay": 0.0}
    setting = replace(setting, block={"type": "AdamW", "params": params})
    start = distinct(SHAPES, setting.torch_dtype)
    training = ZeroTraining(start, SPD, setting, attached=False)
    assert type(training.base).__name__ == kind
    training.projector = attach(training.engine, config=config_of(dict.fromkeys(start, SPD)))
    begun = training.masters()
    seen = SeenGradients(training.base, begun)
    oracle, plain = Oracle(begun, start, SPD), Oracle(begun, start, replace(SPD, rule="none"))
    if training.base.state:  # stage 0 in half precision stepped once, on zeros, while the engine was made
        for one in (oracle, plain):
            one.step({name: torch.zeros_like(w) for name, w in start.items()})
    for t in range(STEPS):
        _backward(training, engine.rank, t, 1.0)
        given = seen.take()
        assert given is not None
        oracle.step(given)
        plain.step(given)
    assert_within_effect(seen.masters(), oracle.weights, plain.weights, dict.fromkeys(start, SPD))
    training.close()
