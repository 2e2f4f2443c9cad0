"""Nothing that ends in a collective may depend on what one rank alone knows; runs on every rank of a launch.

Of each public call the ways in which it can go wrong on one rank alone: all ranks raise, at once, and go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from hashlib import md5
from typing import Any

import torch
from torch import Tensor, nn

from sharded_spd import AdamSPD, SPDConfig, attach
from sharded_spd.config import AnchorConfig, LayerConfig
from sharded_spd.errors import ConfigError
from sharded_spd.rules import FTP
from tests.parity.cases import SPD, gradients, tensors
from tests.support.engines import Ddp, Engine, Hsdp
from tests.support.older_engines import Oss, ZeroRedundancy
from tests.support.one_rank import Decays, Edits, Pulls, Store, Trouble, broken
from tests.support.training import Form, Training, anchor_file

Case = Callable[[Trouble], None]


# ---- constructors


def _construct(trouble: Trouble, **own: Any) -> Training:
    settings = {
        key: own.pop(key) for key in ("rule", "weight_decay", "max_pull", "lr_of_group") if key in own
    }
    if "lr_of_group" in settings:
        settings["lr"] = settings.pop("lr_of_group")
    return Training(
        trouble.engine, tensors(), replace(SPD, **settings), form="adam_spd", give_model=True, **own
    )


def _constructed(*patterns: str, differs: bool = False, **bad_good: tuple[Any, Any]) -> Case:
    """AdamSPD with some settings bad on one rank and good on the others."""

    def case(trouble: Trouble) -> None:
        own = {key: trouble.either(*both) for key, both in bad_good.items()}
        trouble.told(lambda: _construct(trouble, **own), *patterns, differs=differs)

    return case


def _breaks(part: str, *patterns: str, make: Callable[[Trouble], object]) -> Case:
    """Making something while a part of what the user gave is broken."""

    def case(trouble: Trouble) -> None:
        with broken(part, trouble.here):
            trouble.told(lambda: make(trouble), *patterns)
        make(trouble)

    return case


def _missing_file(trouble: Trouble) -> None:
    good = anchor_file(trouble.engine, tensors())
    path = trouble.either(str(trouble.engine.scratch / "nothing"), good)
    trouble.told(lambda: _construct(trouble, anchor=path), "nothing")


def _listed_model(trouble: Trouble) -> tuple[nn.Module, list[tuple[str, nn.Parameter]]]:
    training = _construct(trouble)  # flat engines name their parameters
    return training.model, list(training.params.items())


def _pre_of_another_length(trouble: Trouble) -> None:
    model, named = _listed_model(trouble)
    params = [p for _, p in named]
    pre = [p.detach().clone() for p in params]
    group = {"params": params, "pre": trouble.either(pre[1:], pre)}
    trouble.told(lambda: AdamSPD([group], model=model), "pre")


def _generator_that_raises(trouble: Trouble) -> None:
    model, named = _listed_model(trouble)

    def each() -> Iterator[tuple[str, nn.Parameter]]:
        yield named[0]
        if trouble.here:
            raise KeyError("no more")
        yield from named[1:]

    trouble.told(lambda: AdamSPD(each(), model=model), "no more")


def _model_of_another_type(trouble: Trouble) -> None:
    model, named = _listed_model(trouble)
    trouble.told(lambda: AdamSPD(named, model=trouble.either("model", model)), "Module")


def _another_order(trouble: Trouble) -> None:
    model, named = _listed_model(trouble)
    turned = trouble.either(named[::-1], named)
    trouble.told(lambda: AdamSPD(turned, model=model), "order", differs=True)


def _parameter_left_out(trouble: Trouble) -> None:
    model, named = _listed_model(trouble)
    fewer = trouble.either([named[0], *named[2:]], named)
    trouble.told(lambda: AdamSPD(fewer, model=model), "same parameters", differs=True)


CONSTRUCT: dict[str, Case] = {
    "bad_lr": _constructed("learning rate", lr=(-1.0, 0.01)),
    "bad_betas": _constructed("beta", betas=((0.9, 2.0), (0.9, 0.99))),
    "unknown_rule": _constructed("sdp", rule=("sdp", "spd")),
    "negative_lambda": _constructed("-1", weight_decay=(-1.0, 1.0)),
    "max_pull_of_zero": _constructed("max_pull", max_pull=(0.0, 1.0)),
    "wrong_model": _model_of_another_type,
    "missing_file": _missing_file,
    "prepare": _breaks("prepare", make=partial(_construct, rule=Pulls())),
    **{
        f"store_{part}": _breaks(part, make=lambda trouble: _construct(trouble, anchor=Store()))
        for part in ("problems", "fetch", "numel", "values")
    },
    "pre_of_another_length": _pre_of_another_length,
    "generator": _generator_that_raises,
}
DIFFERENT: dict[str, Case] = {
    "rule": _constructed("rule", differs=True, rule=("l2sp", "spd")),
    "rule_option": _constructed("rule", differs=True, rule=(FTP(k=0.3), FTP(k=0.4))),
    "lambda": _constructed("weight_decay", differs=True, weight_decay=(2.0, 1.0)),
    "max_pull": _constructed("max_pull", differs=True, max_pull=(0.5, 1.0)),
    "no_max_pull": _constructed("max_pull", differs=True, max_pull=(None, 1.0)),
    "lr": _constructed("lr", differs=True, lr_of_group=(0.5, 0.25)),
    "anchor": _constructed("anchor", differs=True, anchor=("zero", "snapshot")),
    "order": _another_order,
    "left_out": _parameter_left_out,
}

# ---- attach


def _base(trouble: Trouble) -> tuple[Any, nn.Module]:
    training = _construct(trouble)
    group = {"params": list(training.params.values()), "lr": 0.01}
    return trouble.engine.optimizer(training.model, torch.optim.Adam, [group])


def _attached(*patterns: str, differs: bool = False, **bad_good: tuple[Any, Any]) -> Case:
    """`attach` with a configuration that is bad on one rank."""

    def case(trouble: Trouble) -> None:
        base, model = _base(trouble)
        own = {key: trouble.either(*both) for key, both in bad_good.items()}
        trouble.told(lambda: attach(base, model, SPDConfig(**own)), *patterns, differs=differs)
        attach(base, model)

    return case


def _attach_breaks(part: str, **config: Any) -> Case:
    def case(trouble: Trouble) -> None:
        base, model = _base(trouble)
        with broken(part, trouble.here):
            trouble.told(lambda: attach(base, model, SPDConfig(**config)))
        attach(base, model, SPDConfig(**config))

    return case


def _attached_already(trouble: Trouble) -> None:
    base, model = _base(trouble)
    first = attach(base, model)
    if not trouble.here:
        first.detach()
    trouble.told(lambda: attach(base, model), "already has a projector attached")


def _no_optimizer(trouble: Trouble) -> None:
    base, model = _base(trouble)
    for bad in ("adam", []):
        trouble.told(lambda bad=bad: attach(trouble.either(bad, base), model), "optimizer")


def _wrong_model(trouble: Trouble) -> None:
    base, model = _base(trouble)
    trouble.told(lambda: attach(base, trouble.either("model", model)), "Module")


def _no_config(trouble: Trouble) -> None:
    base, model = _base(trouble)
    trouble.told(lambda: attach(base, model, trouble.either({"rule": "spd"}, None)))


def _file_of_attach(trouble: Trouble) -> None:
    good = anchor_file(trouble.engine, tensors())
    path = trouble.either(str(trouble.engine.scratch / "nothing"), good)
    base, model = _base(trouble)
    trouble.told(lambda: attach(base, model, SPDConfig(anchor=AnchorConfig(source=path))), "nothing")


ATTACH: dict[str, Case] = {
    "pattern": _attached("nope", layers=((LayerConfig(pattern="nope"),), ())),
    "rule_option": _attached("k", rule=("ftp", "spd"), rule_options=({"nope": 1}, {})),
    "missing_file": _file_of_attach,
    "attached_already": _attached_already,
    "no_optimizer": _no_optimizer,
    "wrong_model": _wrong_model,
    "no_config": _no_config,
    "prepare": _attach_breaks("prepare", rule=Pulls()),
    **{
        f"store_{part}": _attach_breaks(part, anchor=AnchorConfig(source=Store()))
        for part in ("problems", "fetch", "numel", "values")
    },
}
ATTACH_DIFFERENT: dict[str, Case] = {
    "rule": _attached("rule", differs=True, rule=("l2sp", "spd")),
    "rule_option": _attached("rule", differs=True, rule=(Pulls(share=0.2), Pulls())),
    "lambda": _attached("weight_decay", differs=True, weight_decay=(2.0, 1.0)),
    "max_pull": _attached("max_pull", differs=True, max_pull=(0.5, 1.0)),
    "reduction": _attached("reduction", differs=True, reduction=("per_step", "per_inner_step")),
    "anchor": _attached(
        "anchor", differs=True, anchor=(AnchorConfig(source="zero"), AnchorConfig(source="snapshot"))
    ),
}

# ---- on what is bound


def _bound(trouble: Trouble, form: Form = "adam_spd", **own: Any) -> Training:
    """That has stepped once."""
    rule = own.pop("rule", "spd")
    training = Training(
        trouble.engine, tensors(), replace(SPD, rule=rule), form=form, give_model=form == "adam_spd", **own
    )
    training.step(gradients(tensors(), 1)[0])
    return training


def _shares_out(engine: Engine) -> bool:
    """Whether the optimizer gives each parameter to one rank, and wants it without its name."""
    return isinstance(engine, (Oss, ZeroRedundancy))


def _inner(training: Training) -> Any:
    return getattr(training.optimizer, "optim", training.optimizer)


def _good_step(trouble: Trouble, training: Training, *, alone: bool = False) -> None:
    """Goes through on every rank, and leaves them alike."""
    training.step(gradients(tensors(), 1)[0])
    if not _shares_out(trouble.engine) and not alone:
        trouble.same(
            "step counts", sorted({int(s["step"]) for s in _inner(training).state.values() if "step" in s})
        )
    if not trouble.ranks and not alone:
        trouble.same("weights", {name: _digest(w) for name, w in training.weights().items()})


def _digest(tensor: Tensor) -> str:
    return md5(tensor.numpy().tobytes()).hexdigest()


def _called(part: str, call: str, **own: Any) -> Case:
    """A method of the projector while a part of what the user gave is broken."""

    def case(trouble: Trouble) -> None:
        training = _bound(trouble, "attached" if part == "prepare" else "adam_spd", **own)
        method = getattr(training.projector, call)
        with broken(part, trouble.here):
            trouble.told(method)
        method()
        _good_step(trouble, training)

    return case


@contextmanager
def _swapped(trouble: Trouble, training: Training) -> Iterator[None]:
    params = _inner(training).param_groups[0]["params"]
    kept = params[0]
    if trouble.here:
        params[0] = nn.Parameter(kept.detach().clone())
        params[0].grad = kept.grad
    try:
        yield
    finally:
        params[0] = kept


def _called_with_a_swap(call: str) -> Case:
    def case(trouble: Trouble) -> None:
        training = _bound(trouble)
        method = getattr(training.projector, call)
        with _swapped(trouble, training):
            trouble.told(method)
        method()
        _good_step(trouble, training)

    return case


def _bound_to_no_model(trouble: Trouble) -> None:
    training = _bound(trouble)
    trouble.told(lambda: training.projector.bind(trouble.either("model", training.model)))
    training.projector.bind()
    _good_step(trouble, training)


BIND: dict[str, Case] = {
    "store_problems": _called("problems", "bind", anchor=Store()),
    "store_values": _called("values", "bind", anchor=Store()),
    "prepare": _called("prepare", "bind", rule=Pulls()),
    "no_model": _bound_to_no_model,
}
DEVIATION: dict[str, Case] = {
    "store_values": _called("values", "deviation", anchor=Store()),
    "swapped": _called_with_a_swap("deviation"),
}


def _loaded(damage: Callable[[dict[str, Any]], object], *patterns: str) -> Case:
    def case(trouble: Trouble) -> None:
        training = _bound(trouble, rule=Pulls())
        projector = training.projector
        state = projector.state_dict()
        own = {**state, "layers": {fqn: dict(entries) for fqn, entries in state["layers"].items()}}
        if trouble.here:
            damage(own)
        trouble.told(lambda: projector.load_state_dict(own), *patterns)
        projector.load_state_dict(state)
        _good_step(trouble, training)

    return case


def _damaged(entry: object) -> Callable[[dict[str, Any]], None]:
    def damage(state: dict[str, Any]) -> None:
        state["layers"] = {fqn: dict.fromkeys(entries, entry) for fqn, entries in state["layers"].items()}

    return damage


def _group_loaded(damage: Callable[[dict[str, Any]], object], *patterns: str) -> Case:
    """AdamSPD's own load_state_dict."""

    def case(trouble: Trouble) -> None:
        training = _bound(trouble, rule=Pulls())
        base = _inner(training)
        state = base.state_dict()
        own = {**state, "param_groups": [dict(group) for group in state["param_groups"]]}
        if trouble.here:
            damage(own)
        trouble.told(lambda: base.load_state_dict(own), *patterns)
        base.load_state_dict(state)
        _good_step(trouble, training)

    return case


LOAD: dict[str, Case] = {
    "fingerprint": _loaded(lambda state: state.update(fingerprint="0" * 32), "fingerprint"),
    "num_steps": _loaded(lambda state: state.update(num_steps="many")),
    "layers": _loaded(lambda state: state.update(layers="nonsense")),
    "entries": _loaded(_damaged("nonsense")),
    "shapes": _loaded(_damaged(torch.zeros(7, 7, 7))),
    "groups": _group_loaded(lambda state: state["param_groups"].pop()),
    "group_fingerprint": _group_loaded(
        lambda state: state["param_groups"][0].update(anchor_fingerprint="0" * 32), "fingerprint"
    ),
    "state": _group_loaded(lambda state: state.update(state="nonsense")),
    "projector": _group_loaded(lambda state: state.update(projector={"fingerprint": "0" * 32})),
}


def _added(*patterns: str, **bad_good: tuple[Any, Any]) -> Case:
    """AdamSPD.add_param_group."""

    def case(trouble: Trouble) -> None:
        whole = _construct(trouble)
        model, named = whole.model, list(whole.params.items())
        file = anchor_file(trouble.engine, tensors())
        optimizer = AdamSPD(named[:-2], lr=0.01, weight_decay=1.0, model=model)
        group = {"params": named[-2:], **{key: trouble.either(*both) for key, both in bad_good.items()}}
        if group.get("anchor") == "good":
            group["anchor"] = file
        if isinstance(trouble.engine, Ddp):
            trouble.told(lambda: optimizer.add_param_group(group), *patterns)
            return
        whole.backward(gradients(tensors(), 1)[0])

        def add_and_step() -> None:
            """Added groups are bound when all ranks step: one whose own was refused tells it there."""
            with suppress(ConfigError):
                optimizer.add_param_group(group)
            optimizer.step()

        trouble.told(add_and_step, *patterns)

    return case


ADD: dict[str, Case] = {
    "negative_lambda": _added("-1", weight_decay=(-1.0, 1.0)),
    "unknown_rule": _added("sdp", rule=("sdp", "spd")),
    "missing_file": _added("nothing", anchor=("/nothing", "good")),
}

# ---- step

Spoil = Callable[[dict[str, Any]], object]


@contextmanager
def _spoilt(training: Training, here: bool, spoil: Spoil) -> Iterator[None]:
    """The first param group, changed here."""
    group = _inner(training).param_groups[0]
    before = dict(group)
    if here:
        spoil(group)
    try:
        yield
    finally:
        group.clear()
        group.update(before)


class _Steady(torch.optim.Optimizer):
    """Needs no lr."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group.get("lr", 0.01))
        return closure() if closure is not None else None


def _ranks_of_step(trouble: Trouble) -> tuple[int, ...]:
    """Who hears of a step's failure: who sums with that rank."""
    engine = trouble.engine
    if isinstance(engine, Ddp):
        return (trouble.odd,)
    if isinstance(engine, Hsdp):
        shards = engine.world // 2
        first = trouble.odd // shards * shards
        return tuple(range(first, first + shards))
    return ()


def _fails_in_step(
    trouble: Trouble,
    training: Training,
    spoilt: Any,
    *patterns: str,
    differs: bool = False,
    stays: bool = False,
) -> None:
    """`stays`: on that rank the base cannot step either, so that its step is behind from then on."""
    trouble.ranks = _ranks_of_step(trouble)
    training.backward(gradients(tensors(), 1)[0])
    with spoilt:
        trouble.told(_inner(training).step, *patterns, differs=differs)
    training.engine.zero_grad(training.model, training.optimizer)
    # Of settings that differed, lr is one by which the base has stepped what is replicated.
    _good_step(trouble, training, alone=stays or differs or isinstance(trouble.engine, Ddp))


def _group_spoilt(
    spoil: Spoil,
    *patterns: str,
    differs: bool = False,
    stays: bool = False,
    form: Form = "adam_spd",
    **own: Any,
) -> Case:
    def case(trouble: Trouble) -> None:
        training = _bound(trouble, form, **own)
        spoilt = _spoilt(training, trouble.here, spoil)
        _fails_in_step(trouble, training, spoilt, *patterns, differs=differs, stays=stays)

    return case


def _step_breaks(part: str, form: Form = "adam_spd", *, stays: bool = False, **own: Any) -> Case:
    def case(trouble: Trouble) -> None:
        training = _bound(trouble, form, **own)
        _fails_in_step(trouble, training, broken(part, trouble.here), stays=stays)

    return case


def _without_a_reduction(part: str, **own: Any) -> Case:
    """A rule that asks for no sums: nobody waits for the rank, which raises alone."""

    def case(trouble: Trouble) -> None:
        training = _bound(trouble, **own)
        trouble.ranks = (trouble.odd,)
        training.backward(gradients(tensors(), 1)[0])
        with broken(part, trouble.here):
            trouble.told(_inner(training).step)

    return case


def _breaks_after_the_reduction(part: str, form: Form, **own: Any) -> Case:
    """The rank raises at once; the others when it steps again, as do all until they bind anew."""

    def case(trouble: Trouble) -> None:
        training = _bound(trouble, form, **own)
        trouble.ranks = (trouble.odd,)
        training.backward(gradients(tensors(), 1)[0])
        with broken(part, trouble.here):
            trouble.told(_inner(training).step)
        if not isinstance(trouble.engine, Ddp):
            trouble.ranks = _ranks_of_step(trouble)
            trouble.told(_inner(training).step)
            training.projector.bind()
        training.engine.zero_grad(training.model, training.optimizer)
        _good_step(trouble, training, alone=True)

    return case


def _parameter_swapped(trouble: Trouble) -> None:
    training = _bound(trouble)
    _fails_in_step(trouble, training, _swapped(trouble, training), r"bind\(\)", stays=True)


def _group_of_one_rank(trouble: Trouble) -> None:
    whole = _construct(trouble)
    model, params = whole.model, list(whole.params.values())
    half = len(params) // 2
    base = torch.optim.Adam(params[:half], lr=0.01)
    attach(base, model)
    if trouble.here:
        base.add_param_group({"params": params[half:]})
    whole.backward(gradients(tensors(), 1)[0])
    trouble.ranks = _ranks_of_step(trouble)
    trouble.told(base.step, r"bind\(\)")


def _closure(form: Form) -> Case:
    def case(trouble: Trouble) -> None:
        training = _bound(trouble, form)
        trouble.ranks = _ranks_of_step(trouble)
        training.backward(gradients(tensors(), 1)[0])

        def closure() -> Tensor:
            if trouble.here:
                raise KeyError("no batch")
            return torch.zeros(())

        trouble.told(lambda: _inner(training).step(closure), "no batch")
        training.engine.zero_grad(training.model, training.optimizer)
        _good_step(trouble, training, alone=True)

    return case


def _damaged_moments(trouble: Trouble) -> None:
    training = _bound(trouble)
    state = next(iter(_inner(training).state.values()))
    kept = dict(state)
    if trouble.here:
        del state["exp_avg_sq"]
    trouble.ranks = _ranks_of_step(trouble)
    training.backward(gradients(tensors(), 1)[0])
    trouble.told(_inner(training).step, "exp_avg_sq")
    state.update({key: kept[key] for key in kept if key not in state})


STEP: dict[str, Case] = {
    "negative_lambda": _group_spoilt(lambda group: group.update(weight_decay=-1.0), "lambda >= 0"),
    "max_pull": _group_spoilt(lambda group: group.update(max_pull=0.0), "max_pull"),
    "lambda_of_no_number": _group_spoilt(lambda group: group.update(weight_decay="1.0")),
    "no_lr": _group_spoilt(lambda group: group.pop("lr"), "lr", stays=True),
    "no_lr_attached": _group_spoilt(
        lambda group: group.pop("lr"), "lr", form="attached", make_base=_Steady, stays=True
    ),
    "lr_of_no_number": _group_spoilt(lambda group: group.update(lr="0.1"), stays=True),
    "group_of_one_rank": _group_of_one_rank,
    "swapped": _parameter_swapped,
    "closure": _closure("adam_spd"),
    "closure_attached": _closure("attached"),
    "moments": _damaged_moments,
    "values": _step_breaks("values", anchor=Store(), stays=True),
    "term": _step_breaks("term", rule=Pulls()),
    "term_attached": _step_breaks("term", "attached", rule=Pulls()),
    "term_after": _step_breaks("term after", rule=Pulls()),
    # What is replicated beside that rank has been stepped by edited gradients, or not at all.
    "term_of_an_edit": _step_breaks("term", rule=Edits(), stays=True),
    "plan_edit": _step_breaks("plan_edit", rule=Edits(), stays=True),
    "edit_grad": _step_breaks("edit_grad", rule=Edits(), stays=True),
    "pull_before": _without_a_reduction("pull", rule=Decays()),
    "pull": _breaks_after_the_reduction("pull", "adam_spd", rule=Pulls()),
    "pull_attached": _breaks_after_the_reduction("pull", "attached", rule=Pulls()),
    "shard_state": _breaks_after_the_reduction("next_shard_state", "adam_spd", rule=Pulls()),
    "telemetry": _breaks_after_the_reduction("telemetry", "attached", rule=Pulls()),
}
STEP_DIFFERENT: dict[str, Case] = {
    "lr": _group_spoilt(lambda group: group.update(lr=0.5), "lr of", "0.5", differs=True),
    "lr_attached": _group_spoilt(
        lambda group: group.update(lr=0.5), "lr of", "0.5", differs=True, form="attached"
    ),
    "lambda": _group_spoilt(lambda group: group.update(weight_decay=7.0), "7.0", differs=True),
    "max_pull": _group_spoilt(lambda group: group.update(max_pull=0.5), "0.5", differs=True),
}

CALLS: dict[str, dict[str, Case]] = {
    "construct": CONSTRUCT,
    "construct_different": DIFFERENT,
    "attach": ATTACH,
    "attach_different": ATTACH_DIFFERENT,
    "bind": BIND,
    "deviation": DEVIATION,
    "load": LOAD,
    "add": ADD,
    "step": STEP,
    "step_different": STEP_DIFFERENT,
}
NAMED = {"pre_of_another_length", "generator", "wrong_model", "order", "left_out"}
"""Cases that give an optimizer what those that share parameters out do not take."""


def trouble(engine: Engine, *, call: str, source: str, rank: int) -> None:
    """`source` goes wrong in `call` on `rank` (of -1: the last) alone."""
    case = Trouble(engine, f"{call}-{source}", rank % engine.world)
    CALLS[call][source](case)
    case.in_step()
    assert not case.faults, "\n".join(case.faults)
