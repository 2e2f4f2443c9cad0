"""What FSDP1, fairscale and ZeroRedundancyOptimizer have of their own, on every rank of a launch."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from sharded_spd import AdamSPD, SPDConfig, attach, load_config
from sharded_spd.errors import AnchorError, BindingError, ConfigError, UnsupportedError
from tests.parity.cases import (
    RULES,
    SHAPES,
    SPD,
    assert_as_good,
    follow,
    gradients,
    step,
    tensors,
)
from tests.reference.oracle import LayerOptions, Oracle
from tests.support.collectives import Collectives
from tests.support.compare import assert_float64_parity
from tests.support.engines import Engine, Fsdp2
from tests.support.models import Probe
from tests.support.older_engines import Fsdp1
from tests.support.refusals import refused
from tests.support.training import FORMS, Form, Training, anchor_file


def rules_in_a_flat(engine: Engine) -> None:
    """Pulled, decayed, zero-strength and plain layers side by side in one tensor of the base."""
    start, anchors = tensors(dtype=engine.dtype), tensors(dtype=engine.dtype, seed=7)
    options = {name: replace(own, lr=SPD.lr, betas=SPD.betas) for name, own in RULES.items()}
    training = Training(engine, start, options, form="attached", anchor=anchor_file(engine, anchors))
    follow(training, Oracle(start, anchors, options), gradients(start, 10))


def two_groups(engine: Engine) -> None:
    """A group per unit, with its own strength and a learning rate that a scheduler lowers."""
    start = tensors(dtype=engine.dtype)
    inside = LayerOptions(lr=0.01, weight_decay=0.7)
    options = {name: inside if name.startswith("block.") else SPD for name in start}
    for form in FORMS:
        training = Training(engine, start, options, form=form)
        assert len(training.optimizer.param_groups) == 2
        scheduler = torch.optim.lr_scheduler.ExponentialLR(training.optimizer, 0.8)
        oracle, factor = Oracle(start, start, options), 1.0
        for t, given in enumerate(gradients(start, 8)):
            oracle.options = {name: replace(own, lr=own.lr * factor) for name, own in options.items()}
            oracle.step(step(training, given))
            scheduler.step()
            factor *= 0.8
            assert_as_good(training.weights(), oracle.weights, start, label=f"{form}, step {t}:")


def frozen_unit(engine: Engine, *, form: Form) -> None:
    """A frozen flat tensor is bound and left alone."""
    start = tensors(dtype=engine.dtype)
    inside = tuple(name for name in start if name.startswith("block."))
    training = Training(engine, start, SPD, form=form, frozen=inside)
    oracle = Oracle(start, start, SPD)
    for t, given in enumerate(gradients(start, 6)):
        training.step(given)
        oracle.step({name: g for name, g in given.items() if name not in inside})
        assert_as_good(training.weights(), oracle.weights, oracle_start(start), label=f"step {t}:")


def oracle_start(start: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where a frozen layer has not moved, any change is too much: compare with zero instead."""
    return {name: torch.zeros_like(w) for name, w in start.items()}


def checkpoint(engine: Engine) -> None:
    """torch.distributed.checkpoint, sharded: on in the other form, on half of the ranks, on FSDP2, on one."""
    assert isinstance(engine, Fsdp1)
    start = tensors()
    drawn = gradients(start, 10)
    training, oracle = Training(engine, start, SPD), Oracle(start, start, SPD)
    for given in drawn[:5]:
        oracle.step(step(training, given))
    folder = str(engine.scratch / "checkpoint")
    dcp.save(_state(training), checkpoint_id=folder)

    engines: list[Engine] = [
        Fsdp1(engine.scratch, orig=engine.orig),
        Fsdp1(engine.scratch, orig=not engine.orig),
        Fsdp2(engine.scratch),
    ]
    for other in engines:
        _go_on(Training(other, start, SPD), copy.deepcopy(oracle), drawn[5:], folder)
    if engine.world == 4:
        half = dist.new_group([0, 1])
        if engine.rank < 2:
            pair = _Pair(engine.scratch, orig=engine.orig, options={"process_group": half})
            _go_on(Training(pair, start, SPD), copy.deepcopy(oracle), drawn[5:], folder, process_group=half)
    if engine.rank == 0:
        alone = Training(Engine(engine.scratch), start, SPD)
        _go_on(alone, copy.deepcopy(oracle), drawn[5:], folder, no_dist=True)
    dist.barrier()


class _Pair(Fsdp1):
    """FSDP1 over the first two ranks of a larger world."""

    @property
    def world(self) -> int:
        return 2


def _state(training: Training) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(training.model),
        "optim": get_optimizer_state_dict(training.model, training.optimizer),
    }


def _go_on(
    training: Training, oracle: Oracle, grads: list[dict[str, Tensor]], folder: str, **how: Any
) -> None:
    state = _state(training)
    # The default planner fails where a rank has no row of a tensor, whatever the optimizer.
    planner = DefaultLoadPlanner(flatten_sharded_tensors=False)
    dcp.load(state, checkpoint_id=folder, planner=planner, **how)
    set_model_state_dict(training.model, state["model"])
    set_optimizer_state_dict(training.model, training.optimizer, optim_state_dict=state["optim"])
    pulled = 0
    for t, given in enumerate(grads):
        pulled += sum(stats.s != 0 for stats in oracle.step(step(training, given)).values())
        assert_float64_parity(training.weights(), oracle.weights, label=f"step {t} after loading:")
    assert pulled >= 1


def without_model(engine: Engine) -> None:
    """Nobody but the wrapped model tells what a flat tensor is."""
    model = engine.wrap(Probe(tensors(dtype=engine.dtype)))
    wanted = r"FullyShardedDataParallel.*model=model"
    refused(engine, lambda: AdamSPD(model.named_parameters()), (BindingError,), wanted)
    refused(engine, lambda: attach(torch.optim.Adam(model.parameters())), (BindingError,), wanted)


def sharded_after_binding(engine: Engine) -> None:
    """An optimizer made before the model is wrapped: it says so, and goes on once it is bound again."""
    start = tensors()
    model = Probe(start)
    optimizer = AdamSPD(model.named_parameters(), lr=SPD.lr, weight_decay=SPD.weight_decay)
    wrapped = engine.wrap(model)
    params = engine.named(wrapped)
    oracle = Oracle(start, start, SPD)
    for t, given in enumerate(gradients(start, 6)):
        _backward(engine, wrapped, given, t)
        if t == 0:
            refused(engine, optimizer.step, (BindingError,), r"elements, wanted.*bind\(model\)")
            optimizer.bind(wrapped)
        optimizer.step()
        optimizer.zero_grad()
        oracle.step(given)
        assert_float64_parity(engine.weights(params), oracle.weights, label=f"step {t}:")


def channels_last(engine: Engine) -> None:
    """FSDP1 flattens such a weight in another order than a checkpoint has it."""
    weight = torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last)
    model = engine.wrap(Probe({"conv.weight": weight, "conv.bias": torch.zeros(3)}))
    wanted = r"conv\.weight.*channels_last"
    refused(engine, lambda: AdamSPD(model.parameters(), model=model), (UnsupportedError,), wanted)


def ignored(engine: Engine) -> None:
    """A parameter that FSDP1 ignores is whole on every rank."""
    start = tensors()
    probe = Probe(start)
    outside = probe.get_parameter("conv.weight")
    engine.options["ignored_states"] = [outside]
    model = engine.wrap(probe)
    params = {**engine.named(model), "conv.weight": outside}
    optimizer = AdamSPD(params.values(), lr=SPD.lr, weight_decay=SPD.weight_decay, model=model)
    oracle = Oracle(start, start, SPD)
    for t, given in enumerate(gradients(start, 6)):
        model(dict(given)).backward()
        optimizer.step()
        optimizer.zero_grad()
        oracle.step(given)
        got = {**engine.weights({n: p for n, p in params.items() if p is not outside})}
        assert_float64_parity({**got, "conv.weight": outside.detach()}, oracle.weights, label=f"step {t}:")


def anchors_of_a_share(engine: Engine) -> None:
    """Anchors of the parameters that this rank steps, and nothing said to the others."""
    start = tensors()
    for form in FORMS:
        training = Training(engine, start, SPD, form=form)
        held: list[set[str]] = [set()] * engine.world
        dist.all_gather_object(held, set(training.projector.export_anchors()))
        assert sorted(name for own in held for name in own) == sorted(start)
        assert set(training.projector.deviation()) >= held[engine.rank]
        for given in gradients(start, 3):
            training.backward(given)
            with Collectives() as seen:
                training.optimizer.optim.step()  # type: ignore[attr-defined]
            assert not seen.direct
            assert not seen.functional
            training.optimizer.step()
            engine.zero_grad(training.model, training.optimizer)
            training.steps += 1


def anchors_of_a_shard(engine: Engine) -> None:
    """No more than this rank's part of the flat tensors, padding left out; the fingerprint is the model's."""
    start = tensors(dtype=engine.dtype)
    alone = AdamSPD(Probe(start).named_parameters())
    for form in FORMS:
        training = Training(engine, start, SPD, form=form)
        held = training.projector.export_anchors().values()
        numel = sum(anchor.values.numel() for anchor in held if anchor.values is not None)
        assert numel <= sum(p.numel() for p in training.params.values())
        whole = torch.tensor(numel)
        dist.all_reduce(whole)
        assert int(whole) == sum(w.numel() for w in start.values())
        assert training.projector.fingerprint == alone.projector.fingerprint


def same_fingerprint(engine: Engine) -> None:
    """That of all ranks' layers together, as on one process."""
    start = tensors()
    alone = AdamSPD(Probe(start).named_parameters())
    want = alone.param_groups[0]["anchor_fingerprint"]
    attached = Training(engine, start, SPD, form="attached")
    assert attached.projector.fingerprint == alone.projector.fingerprint
    inside = Training(engine, start, SPD)
    if engine.prefix:  # under DDP, which knows the ranks
        assert inside.optimizer.param_groups[0]["anchor_fingerprint"] == want
    assert set(attached.projector.deviation()) == set(start)


def other_anchor_raises(engine: Engine) -> None:
    """A checkpoint that was written with another anchor: on all ranks, before anything moves."""
    start = tensors()
    for form in FORMS if engine.prefix else FORMS[1:]:
        first = Training(engine, start, SPD, form=form, anchor=anchor_file(engine, tensors(seed=1)))
        first.step(gradients(start, 1)[0])
        saved, own = copy.deepcopy(engine.state_dict(first.optimizer)), first.projector.state_dict()
        dist.barrier()  # all have read the file that is written anew
        second = Training(engine, start, SPD, form=form, anchor=anchor_file(engine, tensors(seed=2)))
        second.backward(gradients(start, 1)[0])
        before = second.weights()
        action = (
            partial(_load_and_step, second, saved)
            if form == "adam_spd"
            else partial(second.projector.load_state_dict, own)
        )
        refused(engine, action, (AnchorError,), "another anchor than the checkpoint's: wanted fingerprint")
        assert all(torch.equal(w, before[name]) for name, w in second.weights().items())
        engine.zero_grad(second.model, second.optimizer)


def _load_and_step(training: Training, saved: dict[str, Any]) -> None:
    training.optimizer.load_state_dict(saved)
    training.optimizer.step()


def pre_lists(engine: Engine) -> None:
    """Layers of one shape on different ranks, each with its own anchor out of the whole list."""
    shapes = {"a.weight": (3, 4), "b.weight": (3, 4), "c.weight": (3, 4), "d.weight": (5, 4), "e.bias": (3,)}
    start, anchors = tensors(shapes), tensors(shapes, seed=5)
    model = engine.wrap(Probe(start))
    params = engine.named(model)
    group = {
        "params": list(params.values()),
        "param_names": [f"{engine.prefix}{name}" for name in params],
        "pre": [anchors[name] for name in params],
    }
    make = partial(AdamSPD, model=model)
    optimizer, model = engine.optimizer(model, make, [group], lr=SPD.lr, weight_decay=SPD.weight_decay)
    oracle, pulled = Oracle(start, anchors, SPD), 0
    for t, given in enumerate(gradients(start, 8)):
        _backward(engine, model, given, t)
        optimizer.step()
        optimizer.zero_grad()
        pulled += sum(stats.s != 0 for stats in oracle.step(given).values())
        assert_float64_parity(engine.weights(params), oracle.weights, label=f"step {t}:")
        for groups in (optimizer.param_groups, optimizer.optim.param_groups):  # type: ignore[attr-defined]
            assert not isinstance(groups[0].get("pre"), list), "the anchors are kept in the groups"
    assert pulled >= 3


def lists_of_another_length(engine: Engine) -> None:
    """Without the names, or without the model, nothing tells which entry belongs to which parameter."""
    shapes = {"a.weight": (3, 4), "b.weight": (3, 4), "c.weight": (3, 4), "d.weight": (5, 4)}
    model = engine.wrap(Probe(tensors(shapes)))
    params = engine.named(model)
    anchors = {"params": list(params.values()), "pre": list(tensors(shapes, seed=5).values())}
    with_model = partial(AdamSPD, model=model)
    wanted = r"2 parameters but 4 anchors.*param_names"
    refused(engine, lambda: engine.optimizer(model, with_model, [dict(anchors)]), (AnchorError,), wanted)
    names = {"params": list(params.values()), "param_names": list(params)}
    wanted = r"2 parameters but 4 names.*functools\.partial\(AdamSPD, model=model\)"
    refused(engine, lambda: engine.optimizer(model, AdamSPD, [dict(names)]), (BindingError,), wanted)


def group_added(engine: Engine, *, form: Form) -> None:
    """A group that is added later is anchored then; attached, a step before bind() raises."""
    start = tensors()
    later = ("head.weight", "row.weight", "conv.weight")
    model = engine.wrap(Probe(start))
    params = engine.named(model)
    groups = [{"params": [p for name, p in params.items() if name not in later]}]
    config = SPDConfig(weight_decay=SPD.weight_decay)
    if form == "adam_spd":
        make = partial(AdamSPD, model=model, weight_decay=SPD.weight_decay)
        optimizer, model = engine.optimizer(model, make, groups, lr=SPD.lr)
    else:
        optimizer, model = engine.optimizer(model, torch.optim.Adam, groups, lr=SPD.lr)
        projector = attach(optimizer, model, config)
    oracle = Oracle(start, start, SPD)
    for t, given in enumerate(gradients(start, 7, missing=dict.fromkeys(range(3), later))):
        _backward(engine, model, given, t)
        if t == 3:
            optimizer.add_param_group({"params": [params[name] for name in later]})
            if form == "attached":
                refused(engine, optimizer.step, (BindingError,), r"2 param groups, 1 when.*bind\(\)")
                projector.bind()
        optimizer.step()
        optimizer.zero_grad()
        oracle.step(given)
        assert_float64_parity(engine.weights(params), oracle.weights, label=f"step {t}:")


def _backward(engine: Engine, model: nn.Module, given: dict[str, Tensor], t: int) -> None:
    """One rank in turn supplies the gradients."""
    (model(dict(given)) * (float(engine.world) if t % engine.world == engine.rank else 0.0)).backward()


def pattern_of_another_rank(engine: Engine) -> None:
    """A pattern may match only what another rank steps; one that matches nothing raises on all."""
    start = tensors()
    for name in start:
        options = {other: SPD if other != name else LayerOptions(lr=SPD.lr) for other in start}
        layers = [{"pattern": re.escape(name), "weight_decay": 0.0}]
        model = engine.wrap(Probe(start))
        params = engine.named(model)
        optimizer, model = engine.optimizer(
            model, torch.optim.Adam, [{"params": list(params.values())}], lr=SPD.lr
        )
        refused(
            engine,
            partial(attach, optimizer, model, load_config({"layers": [{"pattern": "hea.weight"}]})),
            (ConfigError,),
            "matches no layer",
        )
        attach(optimizer, model, load_config({"weight_decay": SPD.weight_decay, "layers": layers}))
        oracle = Oracle(start, start, options)
        for t, given in enumerate(gradients(start, 3)):
            _backward(engine, model, given, t)
            optimizer.step()
            optimizer.zero_grad()
            oracle.step(given)
        assert_float64_parity(engine.weights(params), oracle.weights, label=name)


def few_layers(engine: Engine) -> None:
    """A rank that steps nothing."""
    start = tensors({"only.weight": (3, 4)})
    for form in FORMS:
        follow(Training(engine, start, SPD, form=form), Oracle(start, start, SPD), gradients(start, 12))


def two_shares(engine: Engine) -> None:
    """One projector over two optimizers that share out different layers."""
    start = tensors()
    model = engine.wrap(Probe(start))
    params = engine.named(model)
    names = list(params)
    whole = []
    for own, lr in ((names[::2], 0.02), (names[1::2], 0.05)):
        groups = [{"params": [params[name] for name in own]}]
        optimizer, model = engine.optimizer(model, torch.optim.Adam, groups, lr=lr)
        whole.append(optimizer)
    projector = attach(whole, model, SPDConfig(weight_decay=SPD.weight_decay))
    options = {name: replace(SPD, lr=0.02 if name in names[::2] else 0.05) for name in names}
    oracle = Oracle(start, start, options)
    for t, given in enumerate(gradients(start, 6)):
        _backward(engine, model, given, t)
        for optimizer in whole:
            optimizer.step()
            optimizer.zero_grad()
        oracle.step(given)
        assert_float64_parity(engine.weights(params), oracle.weights, label=f"step {t}:")
    assert projector.num_steps == 6


def overlap_with_ddp(engine: Engine) -> None:
    """Its optimizer is made while the backward runs, and steps gradients that nobody else sees."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = engine.wrap(Probe(tensors()))

    def make(kind: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
        return ZeroRedundancyOptimizer(model.parameters(), kind, overlap_with_ddp=True, lr=0.1)

    whole = make(torch.optim.AdamW)
    refused(engine, lambda: attach(whole, model), (UnsupportedError,), "overlap_with_ddp=False")
    refused(engine, lambda: make(AdamSPD), (ValueError,), "functional optimizer")


def lost_buckets(engine: Engine) -> None:
    """ShardedDataParallel reduces what its buffers hold, and torch's zero_grad takes the gradients out."""
    start = tensors({name: SHAPES[name] for name in ("embed.weight", "head.weight", "block.attn.weight")})
    drawn = gradients(start, 3)
    for form in FORMS:
        for trapped in (False, True):
            training = Training(engine, start, SPD, form=form)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for given in drawn:
                    training.backward(given)
                    training.optimizer.step()
                    training.optimizer.zero_grad(set_to_none=trapped)
                    training.steps += 1
            found = sum("reduces gradients in buffers" in str(w.message) for w in caught)
            assert found == trapped, f"{form}, trapped {trapped}: warned {found} times"
            if not trapped:
                oracle = Oracle(start, start, SPD)
                for given in drawn:
                    oracle.step(given)
                assert_float64_parity(training.weights(), oracle.weights)
