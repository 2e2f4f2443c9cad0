"""Bad input, and what only one rank can see; each function runs on every rank of a launch."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from sharded_spd import AdamSPD, SPDConfig, attach
from sharded_spd.config import AnchorConfig, LayerConfig
from sharded_spd.errors import BindingError
from tests.parity.cases import SPD, gradients, tensors
from tests.reference.oracle import Oracle
from tests.support.compare import assert_float64_parity
from tests.support.engines import Engine
from tests.support.models import Probe
from tests.support.refusals import refused
from tests.support.training import Form, Training


def _own_copy(engine: Engine, values: dict[str, Tensor]) -> Path:
    """A checkpoint of this rank's own, as on the disk of its node."""
    folder = engine.scratch / f"node{engine.rank}"
    folder.mkdir(exist_ok=True)
    save_file(values, folder / "model.safetensors")
    return folder / "model.safetensors"


def file_missing_on_one_rank(engine: Engine, *, form: Form) -> None:
    """The others must not go on to a collective alone; DDP's ranks are known from the model."""
    start = tensors()
    path = _own_copy(engine, start)
    if engine.rank == 1:
        path.unlink()
    refused(
        engine,
        lambda: Training(engine, start, SPD, form=form, anchor=str(path), give_model=True),
        (ValueError,),
        "node1",
        r"rank 1|no such",
    )
    again = Training(engine, start, SPD, form=form)
    again.step(gradients(start, 1)[0])


def file_truncated_on_one_rank(engine: Engine, *, form: Form) -> None:
    """A copy that ended early, on the last rank's node."""
    start = tensors()
    path = _own_copy(engine, start)
    if engine.rank == engine.world - 1:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) - 40])
    where = f"node{engine.world - 1}"
    refused(
        engine,
        lambda: Training(engine, start, SPD, form=form, anchor=str(path), give_model=True),
        (ValueError,),
        where,
    )


def file_on_disk_changed_on_one_rank(engine: Engine, *, rule: str) -> None:
    """Seen before its pages are touched, which would end the process; every rank of the scopes raises."""
    start = tensors()
    path = _own_copy(engine, tensors(seed=3))
    options = replace(SPD, rule=rule)
    anchor = AnchorConfig(source=str(path), device="disk")
    training = Training(engine, start, options, form="attached", anchor=anchor)
    first, *others = gradients(start, 3)
    training.step(first)
    if engine.rank == 1:
        os.truncate(path, 100)
    for grads in others:
        training.backward(grads)
        refused(engine, training.update, (ValueError,), r"layer '.*node\d.*has changed")
    refused(engine, training.projector.deviation, (ValueError,), "node1", "100 now")


def file_of_another_model(engine: Engine, *, form: Form) -> None:
    """Missing and misshapen tensors: one error that lists them all."""
    start = tensors()
    other = {name: w for name, w in start.items() if name != "conv.weight"}
    other["block.attn.weight"] = torch.zeros(3, 5)
    other["embed.weight"] = torch.zeros(7, 4)
    path = _own_copy(engine, other)
    refused(
        engine,
        lambda: Training(engine, start, SPD, form=form, anchor=str(path), give_model=True),
        (ValueError,),
        r"conv\.weight",
        r"block\.attn\.weight.*",
        r"embed\.weight",
        r"7, 4|\[7, 4\]",
    )


def pattern_of_nothing(engine: Engine) -> None:
    """A pattern that matches no layer."""
    model = engine.wrap(Probe(tensors()))
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    config = SPDConfig(layers=(LayerConfig(pattern="haed.*", weight_decay=0.0),))
    refused(engine, lambda: attach(base, model, config), (ValueError,), r"haed\.\*", "head")


def parameters_that_one_rank_lacks(engine: Engine) -> None:
    """Left out on one rank, say because it holds nothing of them, or listed in another order there."""
    model = engine.wrap(Probe(tensors()))
    named = list(model.named_parameters())
    odd = engine.rank == engine.world - 1
    fewer = [(fqn, p) for fqn, p in named if not (odd and "attn.bias" in fqn)]
    who = f"rank {engine.world - 1}"
    refused(engine, lambda: AdamSPD(fewer, model=model), (BindingError,), who, "block.attn.bias")
    turned = named[::-1] if odd else named
    refused(engine, lambda: AdamSPD(turned, model=model), (BindingError,), "order")


def negative_lambda(engine: Engine) -> None:
    """Refused before anything is bound."""
    model = engine.wrap(Probe(tensors()))
    refused(engine, lambda: AdamSPD(model.named_parameters(), weight_decay=-1.0), (ValueError,), r"-1")
    refused(engine, lambda: SPDConfig(weight_decay=-1.0), (ValueError,), r"-1")


def loaded_after_snapshot(engine: Engine, *, form: Form) -> None:
    """One row, which lies on one rank of a replica, was changed after the snapshot: every rank raises."""
    start = tensors()
    training = Training(engine, start, SPD, form=form)
    name, weight = next((n, p) for n, p in training.params.items() if "embed.weight" in engine.layers(n))
    with torch.no_grad():
        if not isinstance(weight, DTensor):  # flat
            weight[: 1 - engine.rank] += 1.0
        elif tuple(weight.__create_chunk_list__()[0].offsets) == (0, 0):
            weight.to_local()[0] += 1.0
    training.backward(gradients(start, 1)[0])
    first = re.escape(engine.layers(name)[0])
    refused(engine, training.optimizer.step, (ValueError,), first, r"bind\(\)")


def unbound(engine: Engine, *, form: Form) -> None:
    """A gradient that is zero on all ranks but one is a real step on all; bound, it goes through."""
    start = tensors()
    training = Training(engine, start, SPD, form=form, anchor="deferred")
    zero = {name: torch.zeros_like(w) for name, w in start.items()}
    training.step(zero)
    assert_float64_parity(training.weights(), start)
    one = {**zero, "one": torch.ones(1, dtype=torch.float64)}
    training.backward(one)
    refused(engine, training.optimizer.step, (RuntimeError,), r"bind\(\)")
    assert_float64_parity(training.weights(), start)
    training.projector.bind()
    training.update()


def swapped(engine: Engine, *, form: Form) -> None:
    """Other parameter objects in the group than were bound."""
    start = tensors()
    training = Training(engine, start, SPD, form=form)
    other = engine.wrap(Probe(start))
    params = list(other.parameters())
    for group in training.optimizer.param_groups:
        count = len(group["params"])
        group["params"], params = params[:count], params[count:]
    training.model = other
    training.backward(gradients(start, 1)[0])
    refused(engine, training.optimizer.step, (RuntimeError,), r"bind\(\)")


def nan_on_one_rank(engine: Engine, *, form: Form) -> None:
    """A NaN in one shard: no rank pulls that layer, the others go on, telemetry names it everywhere."""
    start = tensors()
    training = Training(engine, start, SPD, form=form)
    oracle, pulled = Oracle(start, start, SPD), 0
    bad = "embed.weight"
    others = [name for name in start if name != bad]
    for t, grads in enumerate(gradients(start, 10)):
        given = {name: g.clone() for name, g in grads.items()}
        if t == 5:
            given[bad][0, 0] = torch.nan
        training.step(given)
        stats = oracle.step({name: grads[name] for name in (start if t < 5 else others)})
        pulled += sum(stats[name].s > 0 for name in others)
        got = training.weights()
        assert_float64_parity({n: got[n] for n in others}, {n: oracle.weights[n] for n in others})
        metrics = training.projector.metrics()
        assert metrics["nonfinite_layers"] == ([bad] if t >= 5 else [])
        if t >= 5:
            assert metrics["layers"][bad]["s"] == 0
    assert pulled >= 3


def pre_of_another_length(engine: Engine) -> None:
    """One anchor too few."""
    params = list(engine.wrap(Probe(tensors())).parameters())
    pre = [p.detach() for p in params[1:]]
    refused(
        engine,
        lambda: AdamSPD([{"params": params, "pre": pre}], lr=0.01),
        (ValueError,),
        "pre",
        str(len(pre)),
    )


def another_anchor_on_resume(engine: Engine, *, form: Form) -> None:
    """A checkpoint that was written with other anchors."""
    saved = Training(engine, tensors(seed=9), SPD, form=form).projector.state_dict()
    training = Training(engine, tensors(), SPD, form=form)
    refused(engine, lambda: training.projector.load_state_dict(saved), (ValueError,), "anchor")


def unknown_rule(engine: Engine, *, form: Form) -> None:
    """With the nearest known name."""
    model = engine.wrap(Probe(tensors()))
    if form == "adam_spd":
        refused(engine, lambda: AdamSPD(model.named_parameters(), rule="sdp"), (ValueError,), "sdp", "spd")
        return
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    refused(engine, lambda: attach(base, model, SPDConfig(rule="sdp")), (ValueError,), "sdp", "spd")


def more_ranks_than_rows(engine: Engine, *, form: Form) -> None:
    """Is no error: ranks without an element take part and agree."""
    start = tensors({"a.weight": (1, 3), "a.bias": (2,), "b": (1,)})
    training = Training(engine, start, SPD, form=form)
    empty = sum(p.to_local().numel() == 0 for p in training.params.values() if isinstance(p, DTensor))
    counts = [0] * engine.world
    dist.all_gather_object(counts, empty)
    assert max(counts) >= 2
    oracle, pulled = Oracle(start, start, SPD), 0
    for grads in gradients(start, 12):
        training.step(grads)
        pulled += sum(stats.s > 0 for stats in oracle.step(grads).values())
        assert_float64_parity(training.weights(), oracle.weights)
    assert pulled >= 3


def thawed_between_bindings(engine: Engine, *, form: Form) -> None:
    """A frozen layer with fewer rows than ranks steps, and everything is bound anew: no rank checks alone."""
    start = tensors()
    training = Training(engine, start, SPD, form=form, frozen=("row.weight", "one"))
    oracle, grads = Oracle(start, start, SPD), gradients(start, 6)
    for t, given in enumerate(grads):
        if t == 2:
            for name in ("row.weight", "one"):
                training.params[name].requires_grad_(True)
        if t in (1, 3):
            training.projector.bind()
        now = {name: g for name, g in given.items() if t >= 2 or name not in ("row.weight", "one")}
        training.step(now)
        oracle.step(now)
        assert_float64_parity(training.weights(), oracle.weights, label=f"step {t}:")


def frozen_layer_loaded_on_one_rank(engine: Engine, *, form: Form) -> None:
    """A snapshot of a frozen layer is lost where its weight was loaded since, be it on one rank only."""
    start = tensors()
    training = Training(engine, start, SPD, form=form, frozen=("block.attn.weight",))
    layer = training.params["block.attn.weight"]
    with torch.no_grad():
        local = layer.to_local() if isinstance(layer, DTensor) else layer
        if engine.rank == 0:
            local.add_(1.0)
    layer.requires_grad_(True)
    training.backward(gradients(start, 1)[0])
    refused(engine, training.optimizer.step, (ValueError,), "frozen", r"block\.attn\.weight")


def fine_tuned_weights_taken_for_pre_trained(engine: Engine) -> None:
    """The base's moments, which are resumed after attaching, tell every rank, also one that holds nothing."""
    start = tensors()
    first = Training(engine, start, SPD, form="attached")
    grads = gradients(start, 4)
    for given in grads[:2]:
        first.step(given)
    second = Training(engine, first.weights(), SPD, form="attached")
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.backward(grads[2])
    for _ in range(2):
        refused(engine, second.optimizer.step, (ValueError,), "fine-tuned weights", "projector's state")


def moved_while_lambda_was_zero(engine: Engine) -> None:
    """Training without a strength asks nothing of anchors; with one, the weights must not have moved."""
    start = tensors()
    training = Training(engine, start, replace(SPD, weight_decay=0.0))
    grads = gradients(start, 4)
    for given in grads[:2]:
        training.step(given)
    assert not any(a.values is not None for a in training.projector.export_anchors().values())
    for group in training.optimizer.param_groups:
        group["weight_decay"] = SPD.weight_decay
    training.backward(grads[2])
    refused(engine, training.optimizer.step, (ValueError,), "moved while lambda was 0")
    again = Training(engine, start, replace(SPD, weight_decay=0.0))
    for group in again.optimizer.param_groups:
        group["weight_decay"] = SPD.weight_decay
    oracle = Oracle(start, start, SPD)
    for t, given in enumerate(grads):
        again.step(given)
        oracle.step(given)
        assert_float64_parity(again.weights(), oracle.weights, label=f"step {t}:")
