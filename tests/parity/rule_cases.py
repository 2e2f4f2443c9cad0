"""The rules beside SPD on any layout: golden trajectories, the oracles, resuming, resharding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from sharded_spd.checkpoint import Checkpoints
from sharded_spd.rules import CWD, FTP, MAPS, MARSSP, DiGraP, Rule
from tests.parity.cases import follow, gradients, tensors
from tests.parity.resume_cases import reload_everywhere
from tests.reference.golden import read_ftp
from tests.reference.oracle import LayerOptions
from tests.reference.rule_oracles import (
    CWDOracle,
    DiGraPOracle,
    FTPOracle,
    MAPSOracle,
    MarsOracle,
    RuleOracle,
)
from tests.support.collectives import Collectives
from tests.support.compare import assert_bits_equal, assert_float64_parity
from tests.support.engines import Engine
from tests.support.models import Probe
from tests.support.training import Form, Training

RULES: dict[str, tuple[Rule, Callable[..., RuleOracle], float]] = {
    "ftp": (FTP(k=0.4), partial(FTPOracle, k=0.4), 0.3),
    "mars_sp": (MARSSP(radius=0.08), partial(MarsOracle, radius=0.08), 0.3),
    "maps": (MAPS(heads="head.*"), partial(MAPSOracle, head="head.weight"), 2.5),
    "cwd": (CWD(), CWDOracle, 1.5),
    "digrap": (DiGraP(), DiGraPOracle, 0.3),
}
"""Rule, oracle, weight_decay."""

_PULLED = ("maps", "cwd")
"""Whose weight_decay is a strength; the others' is AdamW's decay, and the base's own under `attach`."""


def setup(rule: str, form: Form, start: dict[str, Tensor]) -> tuple[LayerOptions, RuleOracle]:
    """The options of every layer, and the oracle of that form."""
    own, oracle, strength = RULES[rule]
    options = LayerOptions(lr=0.02, weight_decay=strength, rule=own)  # type: ignore[arg-type]
    order = tuple(name for name, _ in Probe(start).named_parameters())
    decays = rule not in _PULLED and form == "adam_spd"
    return options, oracle(start, start, options, decays=decays, order=order)


def ftp_golden(engine: Engine, *, stem: str, form: Form) -> None:
    """The published optimizer's trajectory to 1e-9, on AdamSPD, or attached to torch's AdamW and SGD."""
    ref = read_ftp(stem)
    own = LayerOptions(lr=ref.lr, weight_decay=ref.weight_decay, rule=FTP(k=ref.k))  # type: ignore[arg-type]
    without = LayerOptions(
        lr=ref.lr, weight_decay=ref.weight_decay, rule="decay" if form == "adam_spd" else "none"
    )
    options = {name: without if name in ref.excluded else own for name in ref.names}
    base = None if form == "adam_spd" else partial(_base, decay=ref.weight_decay, momentum=ref.momentum)
    training = Training(engine, ref.init, options, form=form, make_base=base)
    for t, (grads, want) in enumerate(zip(ref.grads, ref.params, strict=True)):
        training.step(grads)
        if t % 3 == 1 or t == len(ref.grads) - 1:
            assert_float64_parity(training.weights(), want, label=f"step {t}:")


def _base(
    groups: list[dict[str, Any]], *, decay: float, momentum: float | None, **extra: Any
) -> torch.optim.Optimizer:
    if momentum is None:
        return torch.optim.AdamW(groups, weight_decay=decay, **extra)
    kept = [{key: v for key, v in group.items() if key in ("params", "lr")} for group in groups]
    return torch.optim.SGD(kept, momentum=momentum, weight_decay=decay, **extra)


def rule(engine: Engine, *, form: Form, name: str) -> None:
    """As the oracle does on whole tensors, also in steps without some gradients."""
    start = tensors()
    options, oracle = setup(name, form, start)
    training = Training(engine, start, options, form=form)
    missing = {3: ("block.attn.weight", "one"), 5: ("embed.weight",)}
    follow(training, oracle, gradients(start, 12, missing=missing))


def rule_in_columns(engine: Engine, *, form: Form, name: str) -> None:
    """Weights split by columns: every row lies on all ranks."""
    start = tensors({"a.weight": (3, 8), "a.bias": (3,), "b.weight": (5, 4, 2), "b.other": (1, 4)})
    engine.options["shard_placement_fn"] = lambda p: Shard(1) if p.ndim > 1 else None
    options, oracle = setup(name, form, start)
    training = Training(engine, start, options, form=form)
    weight = training.params["a.weight"]
    assert isinstance(weight, DTensor)
    assert weight.placements == (Shard(1),)
    follow(training, oracle, gradients(start, 8))


def rule_resumes(engine: Engine, *, form: Form, name: str) -> None:
    """Saved after four steps and loaded into new objects: the same bits as without a break."""
    start = tensors()
    options, _ = setup(name, form, start)
    first = Training(engine, start, options, form=form)
    grads = gradients(start, 8)
    for given in grads[:4]:
        first.step(given)
    weights = {n: p.detach().clone() for n, p in first.params.items()}
    saved, own = copy.deepcopy(first.optimizer.state_dict()), copy.deepcopy(first.projector.state_dict())
    second = Training(engine, start, options, form=form)
    with torch.no_grad():
        for n, p in second.params.items():
            p.copy_(weights[n])
    second.optimizer.load_state_dict(saved)
    if form == "attached":  # AdamSPD's own checkpoint holds it
        second.projector.load_state_dict(own)
    second.steps = first.steps
    for given in grads[4:]:
        first.step(given)
        second.step(given)
        assert_bits_equal(second.weights(), first.weights())


def rule_resharded(engine: Engine, *, form: Form, name: str) -> None:
    """torch.distributed.checkpoint: saved on four ranks, loaded on four, two and one, with the state."""
    start = tensors()
    options, oracle = setup(name, form, start)
    reload_everywhere(engine, start, options, oracle, form=form)


def rule_collectives(engine: Engine, *, form: Form, name: str, expected: int) -> None:
    """So many all-reduces per step, whatever the rule's statistics are."""
    start = tensors()
    options, _ = setup(name, form, start)
    training = Training(engine, start, options, form=form)
    for t, grads in enumerate(gradients(start, 4)):
        training.backward(grads)
        with Collectives() as seen:
            training.optimizer.step()
        training.optimizer.zero_grad()
        training.steps += 1
        if t >= 2:
            assert [op for op, _ in seen.direct] == ["allreduce_"] * expected, f"got {seen.direct}"


def rule_in_checkpoints(engine: Engine, *, form: Form, name: str) -> None:
    """Saved by `Checkpoints` after four steps, loaded into new objects: the same bits as without a break."""
    start = tensors()
    options, _ = setup(name, form, start)
    grads = gradients(start, 8)
    first = Training(engine, start, options, form=form)
    for given in grads[:4]:
        first.step(given)
    checkpoints = Checkpoints(engine.scratch / "run")
    checkpoints.save(4, first.model, first.optimizer, projector=first.projector)
    second = Training(engine, start, options, form=form)
    found = checkpoints.load(second.model, second.optimizer, projector=second.projector)
    assert found is not None
    second.steps = first.steps
    for given in grads[4:]:
        first.step(given)
        second.step(given)
        assert_bits_equal(second.weights(), first.weights())
