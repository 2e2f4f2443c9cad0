"""What one rank alone runs into in the middle of a run, and how training goes on after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sharded_spd import AdamSPD, SPDConfig, attach
from sharded_spd.checkpoint import Checkpoints, export_safetensors
from sharded_spd.errors import ConfigError
from tests.parity.cases import SPD, gradients, tensors
from tests.reference.oracle import Oracle
from tests.support.compare import assert_float64_parity
from tests.support.engines import Ddp, Engine
from tests.support.models import Probe
from tests.support.one_rank import Edits, Pulls, Trouble, broken
from tests.support.training import Form, Training
from tests.support.zero import Setting, ZeroTraining


def _end(trouble: Trouble) -> None:
    trouble.in_step()
    assert not trouble.faults, "\n".join(trouble.faults)


def _own(training: Training) -> Any:
    return getattr(training.optimizer, "optim", training.optimizer)


def setting_put_right(engine: Engine, *, key: str, value: float, rank: int) -> None:
    """A step with a wrong setting: the base steps, nothing is pulled, and all goes on as the oracle does.

    Where ranks share no layer the failing one has not stepped yet, and does it when it is put right.
    """
    trouble = Trouble(engine, "setting_put_right", rank)
    start = tensors()
    training, oracle = Training(engine, start, SPD), Oracle(start, start, SPD)
    group, alone = _own(training).param_groups[0], isinstance(engine, Ddp)
    for t, given in enumerate(gradients(start, 8)):
        training.backward(given)
        if t in (2, 3):
            good = group[key]
            group[key] = value if trouble.here else good
            trouble.ranks = (rank,) if alone else ()
            trouble.told(training.optimizer.step, str(value))
            group[key] = good
            if alone and trouble.here:
                training.optimizer.step()
            if not alone:
                oracle.options = replace(SPD, weight_decay=0.0)
        else:
            training.optimizer.step()
        training.engine.zero_grad(training.model, training.optimizer)
        training.steps += 1
        oracle.step(given)
        oracle.options = SPD
        assert_float64_parity(training.weights(), oracle.weights, label=f"step {t}:")
    trouble.same("counts", sorted({float(s["step"]) for s in _own(training).state.values()}))
    _end(trouble)


class _Stumbles(torch.optim.Adam):
    """Adam whose next step may raise before it has done anything."""

    stumbles = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if self.stumbles:
            raise OverflowError("this base stumbled")
        return super().step(closure)


def base_raises_then(engine: Engine, *, call: str, rank: int) -> None:
    """The base of one rank raises, and that rank goes on to a call in which it tells the others."""
    trouble = Trouble(engine, f"base_raises_then_{call}", rank)
    start = tensors()
    training = Training(engine, start, SPD, form="attached", make_base=_Stumbles)
    base: Any = training.optimizer
    first, second, third = gradients(start, 3)
    training.step(first)
    training.backward(second)
    base.stumbles = trouble.here

    def step() -> None:
        try:
            base.step()
        except OverflowError:
            base.stumbles = False
            if call == "step":
                base.step()
            else:
                getattr(training.projector, call)()

    trouble.told(step, "exception ended")
    training.engine.zero_grad(training.model, base)
    training.step(third)
    _end(trouble)


def bound_while_others_step(engine: Engine, *, form: Form, rank: int) -> None:
    """`bind()` on one rank, a step on the others."""
    trouble = Trouble(engine, f"bound_while_others_step_{form}", rank)
    start = tensors()
    training = Training(engine, start, SPD, form=form)
    first, second, third = gradients(start, 3)
    training.step(first)
    training.backward(second)
    trouble.told(training.projector.bind if trouble.here else training.optimizer.step, r"bind\(\)")
    training.engine.zero_grad(training.model, training.optimizer)
    training.projector.bind()
    training.step(third)
    _end(trouble)


def group_refused(engine: Engine, *, rank: int) -> None:
    """A group that all ranks are refused changes nothing; one that a rank alone is refused, all hear of."""
    trouble = Trouble(engine, "group_refused", rank)
    start = tensors()
    added = list(start)[-2:]
    training, oracle = Training(engine, start, SPD, leave_out=added), Oracle(start, start, SPD)
    optimizer = training.optimizer
    bad, good = ({"params": [(n, training.params[n]) for n in added], "weight_decay": w} for w in (-1.0, 1.0))

    def step(*names: str) -> None:
        given = {n: g for n, g in next(steps).items() if n not in added or n in names}
        training.step(given)
        oracle.step(given)

    def refuse() -> None:
        with pytest.raises(ConfigError, match="-1"):
            optimizer.add_param_group(dict(bad))

    steps = iter(gradients(start, 4))
    step()
    refuse()
    step()
    if trouble.here:
        refuse()
    else:
        optimizer.add_param_group(dict(good))
    trouble.told(optimizer.step, "-1")
    assert len(optimizer.param_groups) == 1
    step()
    optimizer.add_param_group(dict(good))
    oracle.options = {n: replace(SPD, weight_decay=1.0, lr=1e-3) if n in added else SPD for n in start}
    step(*added)
    assert_float64_parity(training.weights(), oracle.weights)
    _end(trouble)


def scopes_in_another_order(engine: Engine, *, form: Form, rank: int) -> None:
    """Parameters on two meshes, listed the other way round on one rank."""
    trouble = Trouble(engine, f"scopes_in_another_order_{form}", rank)
    model = engine.wrap(Probe(tensors()))
    named = list(engine.named(model).items())
    if trouble.here:
        named.reverse()

    def make() -> object:
        if form == "adam_spd":
            return AdamSPD(named, lr=SPD.lr, model=model)
        return attach(torch.optim.Adam([p for _, p in named], lr=SPD.lr), model, SPDConfig())

    trouble.told(make, "order", differs=True)
    _end(trouble)


def files(engine: Engine, *, rank: int) -> None:
    """`Checkpoints` and `export_safetensors`, told otherwise on one rank."""
    trouble = Trouble(engine, "files", rank)
    start = tensors()
    training = Training(engine, start, SPD, form="attached")
    first, second = gradients(start, 2)
    training.step(first)
    folder = engine.scratch / "run"
    checkpoints, projector = Checkpoints(folder), training.projector
    parts: tuple[Any, ...] = (training.model, training.optimizer)
    trouble.told(lambda: checkpoints.save(trouble.either(-1, 1), *parts, projector=projector), "-1")
    extra = trouble.either(object(), 1)
    trouble.told(lambda: checkpoints.save(1, *parts, projector=projector, extra=extra), "object")
    assert checkpoints.latest() is None
    checkpoints.save(1, *parts, projector=projector)
    other = folder / trouble.either("step-9", "step-1")
    trouble.told(lambda: checkpoints.load(*parts, projector=projector, path=other), "step-9")
    assert checkpoints.load(*parts, projector=projector) is not None
    names = trouble.either(dict.fromkeys(start, "same"), None)
    trouble.told(lambda: export_safetensors(training.model, engine.scratch / "out", names=names), "same")
    export_safetensors(training.model, engine.scratch / "out")
    training.step(second)
    _end(trouble)


BREAKS: Mapping[str, tuple[str, Any]] = {
    "before": ("term", Pulls()),
    "after": ("term after", Pulls()),
    "early": ("term", Edits()),
}


def step_of_zero(engine: Engine, *, stage: int, source: str, rank: int, zero: Mapping[str, Any]) -> None:
    """The engine's own collectives come after the step: all ranks raise before them."""
    trouble = Trouble(engine, f"step_of_zero_{stage}_{source}", rank)
    start = {name: w.float() for name, w in tensors().items()}
    part, rule = BREAKS.get(source, ("", None))
    form = "attached" if part else "adam_spd"
    config = SPDConfig(rule=rule) if part else None
    training = ZeroTraining(start, SPD, Setting(stage=stage, zero=zero, form=form), config=config)
    first, second, third = gradients({name: w.float() for name, w in start.items()}, 3)
    training.step(first)
    training.backward(second)
    group = training.base.param_groups[0]
    good = group["weight_decay"]
    if not part and trouble.here:
        group["weight_decay"] = -1.0
    with broken(part, trouble.here) if part else nullcontext():
        trouble.told(training.engine.step)
    group["weight_decay"] = good
    _end(trouble)
    if stage < 3:
        training.engine.optimizer.zero_grad()
        training.step(third)
    whole: Mapping[str, Tensor] = training.masters()
    assert all(torch.isfinite(w).all() for w in whole.values())
    training.close()
