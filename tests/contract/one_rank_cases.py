"""What goes wrong on one rank alone, for every public call; each function runs on every rank of a launch.

Every rank raises within seconds: the one that fails its own error, the others one that names it. That a
collective right after it works, and that training goes on, shows that no rank was left in another one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_spd import AdamSPD, SPDConfig, attach
from sharded_spd.checkpoint import Checkpoints, export_safetensors
from sharded_spd.config import AnchorConfig, LayerConfig, TelemetryConfig
from sharded_spd.errors import (
    AnchorError,
    BindingError,
    CheckpointError,
    ConfigError,
    UnsupportedError,
)
from sharded_spd.rules import FTP
from tests.parity.cases import SPD, gradients, tensors
from tests.reference.oracle import LayerOptions, Oracle
from tests.support.breaking import (
    BreakingEdit,
    BreakingElements,
    BreakingRows,
    BreakingStore,
    Broken,
    broken,
)
from tests.support.compare import assert_float64_parity
from tests.support.engines import Engine
from tests.support.models import Probe
from tests.support.training import Form, Training, anchor_file
from tests.support.zero import Setting, ZeroTraining

PATIENCE = 10.0
"""Seconds until every rank has to have raised, on a machine with other work."""


def together(
    engine: Engine,
    who: int,
    action: Callable[[], object],
    own: type[Exception] | tuple[type[Exception], ...],
    *words: str,
    named: bool = True,
) -> None:
    """`action` raises on every rank soon: `own` on rank `who`, the same class or the package's elsewhere.

    Each of `words` is in every message. `named`: the others' messages name the rank.
    """
    began, raised = time.monotonic(), None
    try:
        action()
    except Exception as error:
        raised = error
    took = time.monotonic() - began
    found = [("", "", False, 0.0)] * engine.world
    kind = "" if raised is None else type(raised).__name__
    dist.all_gather_object(found, (kind, str(raised), isinstance(raised, own), took))
    kind, text, fits, _ = found[who]
    assert fits, f"rank {who}: wanted {own}, got {kind}: {text}; all: {found}"
    package = issubclass(own if isinstance(own, type) else own[0], (ValueError, TypeError, BindingError))
    for rank, (other, said, _, took) in enumerate(found):
        assert other, f"rank {rank} raised nothing; all: {found}"
        assert took < PATIENCE, f"rank {rank} raised after {took:.1f} s; all: {found}"
        assert other == kind or not package, f"rank {rank} raised another class; all: {found}"
        for word in words:
            assert word in said, f"rank {rank}: {word!r} is not in {said!r}"
        assert rank == who or not named or f"rank {who}" in said, f"rank {rank} does not name it: {said!r}"


def alone(engine: Engine, who: int, action: Callable[[], object], own: type[Exception], *words: str) -> None:
    """`action` raises on rank `who` and nowhere else, where a step has no reduction that could tell."""
    began, raised = time.monotonic(), None
    try:
        action()
    except Exception as error:
        raised = error
    found: list[tuple[str, float]] = [("", 0.0)] * engine.world
    text = "" if raised is None else f"{type(raised).__name__}: {raised}"
    dist.all_gather_object(found, (text, time.monotonic() - began))
    assert all(took < PATIENCE for _, took in found), f"{found}"
    assert [rank for rank, (said, _) in enumerate(found) if said] == [who], f"{found}"
    assert engine.rank != who or isinstance(raised, own), f"{found}"
    assert all(word in found[who][0] for word in words), f"{found}"


def goes_on(training: Training) -> None:
    """As if nothing had been: a new training is as the oracle has it."""
    start = training.weights()
    oracle = Oracle(start, start, SPD)
    for given in gradients(start, 4):
        training.step(given)
        oracle.step(given)
    assert_float64_parity(training.weights(), oracle.weights)


def in_step(training: Training) -> None:
    """Replicas hold the same, all of it finite, and every layer has taken the same steps everywhere."""
    engine = training.engine
    inner = getattr(training.optimizer, "optim", training.optimizer)
    counts = {int(state["step"]) for state in inner.state.values() if "step" in state}
    every: list[set[int]] = [set()] * engine.world
    dist.all_gather_object(every, counts)
    assert len(set().union(*every)) <= 1, f"ranks have taken {every} steps"
    whole = training.weights()
    assert all(torch.isfinite(w).all() for w in whole.values())
    copies: list[dict[str, Tensor]] = [{}] * engine.world
    dist.all_gather_object(copies, whole)
    for copy in copies:
        assert_float64_parity(copy, whole)


# --- constructors ---------------------------------------------------------------------------------------

Making = tuple[dict[str, Any], tuple[str, ...], type[Exception], tuple[str, ...]]
"""What `Training` is told on the failing rank, what breaks there, the error, words of it."""

MAKING: dict[str, Making] = {
    "lr": ({"options": replace(SPD, lr=-1.0)}, (), ValueError, ("-1",)),
    "unknown_rule": ({"options": replace(SPD, rule="sdp")}, (), ConfigError, ("sdp",)),
    "lambda": ({"options": replace(SPD, weight_decay=-1.0)}, (), ValueError, ("-1",)),
    "max_pull": ({"options": replace(SPD, max_pull=0.0)}, (), ValueError, ("max_pull",)),
    "missing_file": ({"anchor": "/nowhere/model.safetensors"}, (), AnchorError, ("/nowhere",)),
    "prepare": ({}, ("prepare",), Broken, ("prepare is broken",)),
    "store_problem": ({}, ("problem",), AnchorError, ("no such layer",)),
    "store_problems": ({}, ("problems",), Broken, ("problems is broken",)),
    "store_fetch": ({}, ("fetch",), Broken, ("fetch is broken",)),
    "store_numel": ({}, ("numel",), AnchorError, ("elements",)),
    "store_chunk": ({}, ("chunk",), Broken, ("chunk is broken",)),
}
NOT_ATTACHED = ("lr", "unknown_rule", "lambda", "max_pull")
"""That is torch's or the configuration's to refuse, before any call of ours."""


def making(engine: Engine, *, trouble: str, form: Form, who: int) -> None:
    """`AdamSPD(...)` or `attach(...)`."""
    start = tensors()
    changed, places, own, words = MAKING[trouble]
    store = {"anchor": BreakingStore()} if trouble.startswith("store") else {}
    rule = {"options": replace(SPD, rule=BreakingRows())} if trouble == "prepare" else {}  # type: ignore[arg-type]
    settings = {"options": SPD, **store, **rule}
    bad = engine.rank == who
    settings |= changed if bad else {}
    with broken(*places) if bad else nullcontext():
        together(
            engine,
            who,
            lambda: Training(engine, start, settings.pop("options"), form=form, **settings),
            own,
            *words,
        )
    goes_on(Training(engine, start, SPD, form=form))


def parameters_that_raise(engine: Engine, *, who: int) -> None:
    """`AdamSPD` of a generator that raises half way, and of `pre` of another length."""
    model = engine.wrap(Probe(tensors()))

    def params() -> Iterator[tuple[str, nn.Parameter]]:
        for n, pair in enumerate(model.named_parameters()):
            if n == 3 and engine.rank == who:
                raise KeyError("a layer that is not there")
            yield pair

    together(engine, who, lambda: AdamSPD(params(), model=model), KeyError, "not there")
    own = list(model.parameters())
    pre = [p.detach().clone() for p in own][engine.rank == who :]
    groups = [{"params": own, "pre": pre}]
    together(engine, who, lambda: AdamSPD(groups, model=model), ValueError, "pre")


def attaching(engine: Engine, *, trouble: str, who: int) -> None:
    """`attach` of what is not to be attached to, or with what cannot be done."""
    start, bad = tensors(), engine.rank == who
    model = engine.wrap(Probe(start))
    params = list(engine.named(model).values())
    base, model = engine.optimizer(model, torch.optim.Adam, [{"params": params, "lr": SPD.lr}])
    target: Any = base
    config: Any = SPDConfig(weight_decay=SPD.weight_decay)
    own, word = ConfigError, ""
    if trouble == "pattern":
        own, word = ConfigError, "haed"
        layer = LayerConfig(pattern="haed.*", rule="none")
        config = replace(config, layers=(layer,)) if bad else config
    elif trouble == "config":
        own, config = UnsupportedError, {"rule": "spd"} if bad else config
    elif trouble == "target":
        own, target = UnsupportedError, "adam" if bad else base
    elif trouble == "attached":
        own, word = UnsupportedError, "attached"
        if bad:
            inner = getattr(base, "optim", base)
            inner.register_step_pre_hook(lambda *args: None)
            _mark_attached(inner)
    elif trouble == "telemetry":
        own, word = OSError, "/proc"
        config = replace(config, telemetry=TelemetryConfig(every=1, path="/proc/nope/t.jsonl"))
        who = 0  # the only one that writes
    together(engine, who, lambda: attach(target, model, config), own, word)


def _mark_attached(optimizer: torch.optim.Optimizer) -> None:
    from weakref import ref

    from sharded_spd.api import _ATTACHED

    class Other:
        attached = True

    optimizer.other = Other()  # type: ignore[attr-defined]
    _ATTACHED[optimizer] = ref(optimizer.other)  # type: ignore[attr-defined]


# --- settings that are no faults by themselves, and differ ------------------------------------------------

DIFFER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rule": ({}, {"rule": "l2sp"}),
    "lambda": ({}, {"weight_decay": 0.5}),
    "no_lambda": ({}, {"weight_decay": 0.0}),
    "max_pull": ({}, {"max_pull": 1.0}),
    "anchor": ({}, {"anchor": "zero"}),
    "rule_options": ({"rule": FTP(k=0.5)}, {"rule": FTP(k=0.25)}),
    "lr": ({}, {"lr": 0.5}),
}


def settings_differ(engine: Engine, *, setting: str, form: Form, who: int) -> None:
    """Of rules, strengths, anchors, options, learning rates: each rank's are fine by themselves."""
    start = tensors()
    common, other = DIFFER[setting]
    told = {**common, **(other if engine.rank == who else {})}
    anchor = {"anchor": told.pop("anchor")} if "anchor" in told else {}
    options = replace(SPD, **told)
    together(
        engine,
        who,
        lambda: Training(engine, start, options, form=form, **anchor),
        (ConfigError, BindingError, AnchorError),
        "rank",
        named=False,
    )
    goes_on(Training(engine, start, SPD, form=form))


def deferral_differs(engine: Engine, *, who: int) -> None:
    """One rank waits for a reduction that the others make in each step."""
    model = engine.wrap(Probe(tensors()))
    base = torch.optim.Adam(list(engine.named(model).values()), lr=SPD.lr)
    config = SPDConfig(defer=engine.rank == who)
    together(engine, who, lambda: attach(base, model, config), ConfigError, "defer", named=False)


def order_differs(engine: Engine, *, form: Form, who: int) -> None:
    """Of the parameters, and so of the process groups that split them."""
    model = engine.wrap(Probe(tensors()))
    named = list(engine.named(model).items())
    if engine.rank == who:
        named.reverse()

    def make() -> object:
        if form == "adam_spd":
            return AdamSPD(named, lr=SPD.lr, model=model)
        return attach(torch.optim.Adam([p for _, p in named], lr=SPD.lr), model, SPDConfig())

    together(engine, who, make, BindingError, "order", named=False)


# --- bind, add_param_group --------------------------------------------------------------------------------


def binding(engine: Engine, *, trouble: str, form: Form, who: int) -> None:
    """`bind()` of anchors that were deferred, and anew."""
    start, bad = tensors(), engine.rank == who
    rows = replace(SPD, rule=BreakingRows()) if trouble == "prepare" else SPD  # type: ignore[arg-type]
    training = Training(engine, start, rows, form=form, anchor="deferred")
    projector = training.projector
    if trouble == "model":
        model: Any = "model" if bad else training.model
        together(engine, who, lambda: projector.bind(model), (UnsupportedError, TypeError))
    else:
        with broken("prepare") if bad else nullcontext():
            together(engine, who, projector.bind, Broken, "prepare is broken")
    projector.bind()
    if trouble == "model":
        goes_on(training)
    elif engine.rank == who:
        with broken("prepare"):
            together(engine, who, projector.bind, Broken, "prepare is broken")
    else:
        together(engine, who, projector.bind, Broken, "prepare is broken")


GROUPS: dict[str, tuple[dict[str, Any], tuple[str, ...], type[Exception]]] = {
    "lambda": ({"weight_decay": -1.0}, (), ValueError),
    "unknown_rule": ({"rule": "sdp"}, (), ConfigError),
    "missing_file": ({"anchor": "/nowhere/model.safetensors"}, (), AnchorError),
    "prepare": ({}, ("prepare",), Broken),
    "fetch": ({}, ("fetch",), Broken),
}


def adding_a_group(engine: Engine, *, trouble: str, who: int) -> None:
    """`AdamSPD.add_param_group`, and a step after it: the group is on all ranks or on none."""
    start, bad = tensors(), engine.rank == who
    model = engine.wrap(Probe(start))
    named = list(engine.named(model).items())
    optimizer = AdamSPD(named[:-1], lr=SPD.lr, weight_decay=SPD.weight_decay, model=model)
    changed, places, own = GROUPS[trouble]
    group: dict[str, Any] = {"params": named[-1:]}
    group |= {"rule": BreakingRows()} if trouble == "prepare" else {}
    group |= {"anchor": BreakingStore()} if trouble == "fetch" else {}
    group |= changed if bad else {}

    def add_and_step() -> None:
        optimizer.add_param_group(group)
        optimizer.step()

    with broken(*places) if bad else nullcontext():
        together(engine, who, add_and_step, own)
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": named[-1:]})
    training = Training.__new__(Training)
    training.engine, training.model, training.params = engine, model, dict(named)
    training.optimizer, training.projector, training.steps = optimizer, optimizer.projector, 0
    goes_on(training)


# --- steps ------------------------------------------------------------------------------------------------


class Stumbles(torch.optim.Adam):
    """Adam that raises where a test says so, before it has done anything."""

    stumbles = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Adam's."""
        if self.stumbles:
            raise OverflowError("this base stumbled")
        return super().step(closure)


RULES = {
    "statistic": BreakingRows(),
    "shrink": BreakingRows(),
    "next_shard_state": BreakingRows(),
    "early_statistic": BreakingEdit(),
    "plan_edit": BreakingEdit(),
    "edit_grad": BreakingEdit(),
    "shrink_elements": BreakingElements(),
}
LATE = ("shrink", "next_shard_state", "shrink_elements")
"""After the last reduction of a step: the other ranks can only hear of it in the next one."""


def in_a_step(engine: Engine, *, trouble: str, form: Form, who: int, told: bool) -> None:
    """A setting, a gradient, a parameter; `told`: the step has a reduction, else the rank raises alone."""
    start, bad = tensors(), engine.rank == who
    training = Training(engine, start, SPD, form=form)
    oracle = Oracle(start, start, SPD)
    first, second, third, *rest = gradients(start, 6)
    for given in (first, second):
        training.step(given)
        oracle.step(given)
    training.backward(third)
    inner = getattr(training.optimizer, "optim", training.optimizer)
    own, word, undo = _break(inner, trouble) if bad else (Exception, "", lambda: None)
    kinds: list[Any] = [None] * engine.world
    dist.all_gather_object(kinds, (own, word))
    own, word = kinds[who]
    check = together if told else alone
    check(engine, who, training.optimizer.step, own, word)
    undo()
    if trouble in ("lambda", "max_pull"):  # before the base: it has stepped everywhere, and nothing was pulled
        if told:
            plain = replace(SPD, weight_decay=0.0)
            oracle.options = plain
        elif bad:
            inner.step()
        oracle.step(third)
        oracle.options = SPD
    training.engine.zero_grad(training.model, training.optimizer)
    training.steps += 1
    if trouble == "swapped":
        return  # the parameters that were bound are no more; `bind()` is for that
    if trouble in ("lambda", "max_pull"):
        for given in rest:
            training.step(given)
            oracle.step(given)
            assert_float64_parity(training.weights(), oracle.weights)
    for given in rest:
        training.step(given)
    if told and trouble in ("lambda", "max_pull"):
        in_step(training)


def _break(
    optimizer: torch.optim.Optimizer, trouble: str
) -> tuple[type[Exception], str, Callable[[], object]]:
    """Break something of this rank's optimizer; the error, a word of it, and how to mend it."""
    group = optimizer.param_groups[0]
    before = dict(group)
    if trouble == "lambda":
        group["weight_decay"] = -1.0
        return ConfigError, "-1", lambda: group.update(before)
    if trouble == "max_pull":
        group["max_pull"] = 0.0
        return ConfigError, "max_pull", lambda: group.update(before)
    if trouble == "lr":
        del group["lr"]
        return KeyError, "lr", lambda: group.update(before)
    if trouble == "group":
        stray = nn.Parameter(torch.ones(3, dtype=torch.float64))
        stray.grad = torch.ones(3, dtype=torch.float64)
        torch.optim.Optimizer.add_param_group(optimizer, {**before, "params": [stray]})
        return BindingError, "bind()", optimizer.param_groups.pop
    param = next(p for p in group["params"] if p.grad is not None and p.numel() and p.ndim)
    grad = param.grad
    if trouble == "sparse":
        param.grad = grad.to_sparse()
        return UnsupportedError, "sparse", lambda: setattr(param, "grad", grad)
    assert trouble == "swapped"
    at = next(i for i, p in enumerate(group["params"]) if p is param)
    other = nn.Parameter(param.detach().clone())
    other.grad = grad
    group["params"][at] = other
    return BindingError, "bind()", lambda: None


def in_a_rule(engine: Engine, *, trouble: str, who: int, told: bool) -> None:
    """A rule's own code raises on one rank; what it does after the reduction is told a step later."""
    start, bad = tensors(), engine.rank == who
    options = replace(SPD, rule=RULES[trouble])  # type: ignore[arg-type]
    training = Training(engine, start, options, form="attached")
    first, second, third = gradients(start, 3)
    training.step(first)
    place = trouble.removeprefix("early_")
    training.backward(second)
    late = trouble in LATE
    with broken(place) if bad else nullcontext():
        check = alone if late or not told else together
        check(engine, who, training.optimizer.step, Broken, f"{place} is broken")
    training.engine.zero_grad(training.model, training.optimizer)
    if late and told:
        training.backward(third)
        together(engine, who, training.optimizer.step, Broken, f"{place} is broken")
        training.engine.zero_grad(training.model, training.optimizer)
        training.projector.bind()
    training.step(third)


def in_a_store(engine: Engine, *, who: int, told: bool) -> None:
    """The values of a user's store cannot be read in a step."""
    start, bad = tensors(), engine.rank == who
    training = Training(engine, start, SPD, form="attached", anchor=BreakingStore())
    first, second, third = gradients(start, 3)
    training.step(first)
    training.backward(second)
    check = together if told else alone
    with broken("chunk") if bad else nullcontext():
        check(engine, who, training.optimizer.step, Broken, "chunk is broken")
        check(engine, who, lambda: _measure(training), Broken) if told else None
    training.engine.zero_grad(training.model, training.optimizer)
    training.step(third)


def _measure(training: Training) -> None:
    training.projector.deviation()


def in_a_closure(engine: Engine, *, form: Form, who: int, told: bool) -> None:
    """The closure raises on one rank, after its backward."""
    start, bad = tensors(), engine.rank == who
    training = Training(engine, start, SPD, form=form)
    first, second, third = gradients(start, 3)
    training.step(first)

    def closure() -> Tensor:
        training.backward(second)
        if bad:
            raise KeyError("a batch that is not there")
        return torch.zeros(())

    check = together if told else alone
    check(engine, who, lambda: training.optimizer.step(closure), KeyError, "not there")
    training.engine.zero_grad(training.model, training.optimizer)
    training.step(third)


def in_the_base(engine: Engine, *, then: str, who: int) -> None:
    """The base raises on one rank, which then does something else: the others hear of it there."""
    start, bad = tensors(), engine.rank == who
    training = Training(engine, start, SPD, form="attached", make_base=Stumbles)
    base: Any = training.optimizer
    first, second, third = gradients(start, 3)
    training.step(first)
    training.backward(second)
    base.stumbles = bad

    def step() -> None:
        try:
            base.step()
        except OverflowError:
            base.stumbles = False
            getattr(training if then == "update" else training.projector, then)()

    together(engine, who, step, BindingError, named=False)
    training.engine.zero_grad(training.model, base)
    training.step(third)


def one_calls_while_others_step(engine: Engine, *, call: str, who: int) -> None:
    """A rank alone binds, while the others step: no rank waits for good."""
    start, bad = tensors(), engine.rank == who
    training = Training(engine, start, SPD, form="adam_spd")
    first, second, *_ = gradients(start, 2)
    training.step(first)
    training.backward(second)
    action = getattr(training.projector, call) if bad else training.optimizer.step
    together(engine, who, action, BindingError, named=False)


# --- state, measures, files ---------------------------------------------------------------------------------


def loading(engine: Engine, *, trouble: str, form: Form, who: int) -> None:
    """`load_state_dict`, of a file of one rank's own, say."""
    start, bad = tensors(), engine.rank == who
    options = replace(SPD, rule=BreakingRows())  # type: ignore[arg-type]
    training = Training(engine, start, options, form=form)
    first, second = gradients(start, 2)
    training.step(first)
    saved = training.projector.state_dict()
    own: Any = AnchorError
    damaged = dict(saved)
    if trouble == "fingerprint":
        damaged["fingerprint"] = "0" * 32
    elif trouble == "num_steps":
        own, damaged["num_steps"] = (ValueError, TypeError), "many"
    elif trouble == "layers":
        own = (ValueError, TypeError, LookupError, AttributeError, RuntimeError)
        damaged["layers"] = dict.fromkeys(saved["layers"], 3)
    given = damaged if bad else saved
    together(engine, who, lambda: training.projector.load_state_dict(given), own)
    training.projector.load_state_dict(saved)
    training.step(second)


def loading_an_optimizer(engine: Engine, *, trouble: str, who: int) -> None:
    """`AdamSPD.load_state_dict` of another optimizer's state on one rank."""
    start, bad = tensors(), engine.rank == who
    options = {n: replace(SPD, rule="ftp", lr=0.01 if n == "one" else 0.02) for n in start}
    training = Training(engine, start, options, form="adam_spd")
    optimizer = training.optimizer
    first, second = gradients(start, 2)
    training.step(first)
    saved = optimizer.state_dict()
    given = {**saved, "param_groups": [dict(group) for group in saved["param_groups"]]}
    own: type[Exception] = AnchorError
    if bad and trouble == "fingerprint":
        given["param_groups"][0]["anchor_fingerprint"] = "0" * 32 + "/1"
    if trouble == "groups":
        own = ValueError
        if bad:
            given["param_groups"].pop()
    if trouble == "keys":
        own = KeyError
        if bad:
            del given["param_groups"]
    together(engine, who, lambda: optimizer.load_state_dict(given), own)
    optimizer.load_state_dict(saved)
    training.step(second)


def measuring(engine: Engine, *, who: int) -> None:
    """`deviation()` where the files of one rank have changed."""
    start, bad = tensors(), engine.rank == who
    path = Path(anchor_file(engine, start))
    own = path.with_name(f"own{engine.rank}.safetensors")
    own.write_bytes(path.read_bytes())
    anchor = AnchorConfig(source=str(own), device="disk")
    training = Training(engine, start, SPD, form="attached", anchor=anchor)
    first, *_ = gradients(start, 1)
    training.step(first)
    if bad:
        own.write_bytes(b"short")
    together(engine, who, training.projector.deviation, AnchorError, "own")


def saving(engine: Engine, *, trouble: str, who: int) -> None:
    """`Checkpoints` and `export_safetensors`, told otherwise on one rank."""
    start, bad = tensors(), engine.rank == who
    training = Training(engine, start, SPD, form="attached")
    first, second = gradients(start, 2)
    training.step(first)
    folder = engine.scratch / "run"
    checkpoints = Checkpoints(folder)
    parts: tuple[Any, ...] = (training.model, training.optimizer)
    projector = training.projector
    if trouble == "step":
        step = -1 if bad else 1
        together(engine, who, lambda: checkpoints.save(step, *parts, projector=projector), CheckpointError)
    elif trouble == "extra":
        extra = object() if bad else 1
        together(
            engine,
            who,
            lambda: checkpoints.save(1, *parts, projector=projector, extra=extra),
            (CheckpointError, TypeError, ValueError),
        )
    elif trouble == "load":
        checkpoints.save(1, *parts, projector=projector)
        other = folder / ("step-9" if bad else "step-1")
        together(
            engine,
            who,
            lambda: checkpoints.load(*parts, projector=projector, path=other),
            CheckpointError,
        )
        assert checkpoints.load(*parts, projector=projector) is not None
    elif trouble == "export_names":
        names = dict.fromkeys(start, "same") if bad else None
        target = engine.scratch / "out"
        together(
            engine, who, lambda: export_safetensors(training.model, target, names=names), CheckpointError
        )
        export_safetensors(training.model, engine.scratch / "out2")
    training.step(second)


# --- DeepSpeed ----------------------------------------------------------------------------------------------


def in_a_step_of_zero(engine: Engine, *, stage: int, trouble: str, who: int, sub: bool = False) -> None:
    """ZeRO's ranks step parts of flats; the engine's own collectives come after the step."""
    start = {name: w.float() for name, w in tensors().items()}
    zero: Mapping[str, Any] = {"sub_group_size": 20} if sub else {}
    form = "adam_spd" if trouble in ("lambda", "lr") else "attached"
    config = None
    options = SPD
    if form == "attached":
        config = SPDConfig(weight_decay=SPD.weight_decay, rule=RULES[trouble])
    training = ZeroTraining(start, options, Setting(stage=stage, zero=zero, form=form), config=config)
    bad = engine.rank == who
    first, second, third = gradients(start, 3)
    training.step(first)
    training.backward(second)
    base = training.base
    undo: Callable[[], object] = lambda: None  # noqa: E731
    own: type[Exception] = {"lambda": ConfigError, "lr": KeyError}.get(trouble, Broken)
    if bad and form == "adam_spd":
        _, _, undo = _break(base, trouble)
    place = trouble.removeprefix("early_")
    with broken(place) if bad and form == "attached" else nullcontext():
        together(engine, who, training.engine.step, own)
    undo()
    training.engine.optimizer.zero_grad()
    training.backward(third)
    training.close()
