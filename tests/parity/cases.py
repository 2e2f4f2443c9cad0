"""What every engine has to do as the oracle does; each function runs on every rank of a launch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from sharded_spd import AdamSPD, SPDConfig, attach
from tests.reference.golden import read_golden
from tests.reference.oracle import BaseOracle, LayerOptions, Oracle
from tests.support.compare import (
    assert_bits_equal,
    assert_float32_parity,
    assert_float64_parity,
    assert_layers_close,
)
from tests.support.engines import Engine
from tests.support.models import Probe
from tests.support.training import Form, Training, anchor_file, base_groups, config_of

SPD = LayerOptions(lr=0.02, weight_decay=1.5)

SHAPES = {
    "embed.weight": (6, 4),
    "block.attn.weight": (5, 3),
    "block.attn.bias": (5,),
    "block.norm.weight": (3,),
    "block.mlp.weight": (4, 5),
    "conv.weight": (2, 3, 2),
    "head.weight": (3, 2),
    "row.weight": (1, 6),
    "one": (1,),
}
"""Five rows and two over four ranks, one row over any, one element: uneven and empty shards.

FSDP2 itself fails on a tensor-parallel shard that is empty, so the layer of one row is none of those.
"""


def tensors(
    shapes: Mapping[str, tuple[int, ...]] = SHAPES, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Tensor]:
    """Random layers, exactly representable in float32."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def gradients(
    like: Mapping[str, Tensor], steps: int, *, missing: Mapping[int, Sequence[str]] | None = None
) -> list[dict[str, Tensor]]:
    """Random gradients, so that half of the conditions fire; `missing[t]` names the layers without one."""
    skip = missing or {}
    result = []
    for t in range(steps):
        drawn = tensors({name: tuple(w.shape) for name, w in like.items()}, seed=1000 + t)
        result.append(
            {name: g.to(like[name].dtype) for name, g in drawn.items() if name not in skip.get(t, ())}
        )
    return result


def follow(
    training: Training,
    oracle: Oracle | BaseOracle,
    grads: Sequence[Mapping[str, Tensor]],
    *,
    pulls: bool = True,
) -> None:
    """Both take the same steps and agree, looked at every third; `pulls`: the rule has to have acted."""
    pulled = 0
    begun = {name: w.clone() for name, w in oracle.weights.items()}
    for t, given in enumerate(grads):
        pulled += sum(stats.s != 0 for stats in oracle.step(step(training, given)).values())
        if t % 3 == 1 or t == len(grads) - 1:
            assert_parity(training, oracle.weights, begun, label=f"step {t}:")
    assert not pulls or pulled >= 3, f"the case pulls only {pulled} times and shows nothing"


def step(training: Training, given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """One step; the gradients that arrived, which are those given, and zeros."""
    training.backward(given)
    seen = training.engine.arrived(training.params, given)
    training.update()
    lost = set(given) - set(seen)
    assert not lost, f"gradients of {lost} did not arrive"
    for name, grad in seen.items():
        want = given.get(name, torch.zeros_like(grad))
        assert not training.engine.exact or torch.equal(grad, want), f"another gradient of {name} arrived"
    return seen


def assert_parity(
    training: Training, want: Mapping[str, Tensor], start: Mapping[str, Tensor], *, label: str = ""
) -> None:
    """To what the dtype allows."""
    assert_as_good(training.weights(), want, start, label=label)


def assert_as_good(
    got: Mapping[str, Tensor], want: Mapping[str, Tensor], start: Mapping[str, Tensor], *, label: str = ""
) -> None:
    """To what the dtype of `got` allows."""
    if next(iter(got.values())).dtype == torch.float64:
        assert_float64_parity(got, want, label=label)
    else:
        assert_float32_parity(got, want, start, label=label)


def golden(engine: Engine, *, stem: str, form: Form, dtype: torch.dtype) -> None:
    """A golden trajectory; where the engine rounds gradients, the oracle is fed what arrives."""
    ref = read_golden(stem)
    init = {name: w.to(dtype) for name, w in ref.init.items()}
    anchor = "zero" if ref.zero_anchor else "snapshot"
    if stem == "spd_resumed":
        anchor = anchor_file(engine, {name: w.to(dtype) for name, w in ref.anchors.items()})
    training = Training(engine, init, ref.options, form=form, anchor=anchor, amsgrad=ref.amsgrad)
    oracle = Oracle(init, ref.anchors, ref.options, amsgrad=ref.amsgrad)
    filled = False
    for t, grads in enumerate(ref.grads):
        sent = {name: g.to(dtype) for name, g in grads.items()}
        if engine.exact:
            seen = step(training, sent)
        else:
            training.backward(sent)
            seen = training.gradients()
            training.update()
        filled |= set(seen) != set(grads)
        oracle.step(seen)
        if t % 3 != 1 and t != len(ref.grads) - 1:
            continue  # gathering every layer takes longer than the step
        want = ref.params[t] if engine.exact and not filled else oracle.weights
        if dtype == torch.float64:
            assert_float64_parity(training.weights(), want, label=f"step {t}:")
        else:
            assert_layers_close(training.weights(), want, relative=2e-6, label=f"step {t}:")
    if dtype == torch.float32:
        assert_float32_parity(training.weights(), want, init)


def statistics(engine: Engine, *, form: Form) -> None:
    """Condition, ratio, pull and deviation of every layer and step, as the golden file has them."""
    ref = read_golden("spd_strong")
    training = Training(engine, ref.init, ref.options, form=form)
    for t, grads in enumerate(ref.grads):
        training.step(grads)
        metrics = training.projector.metrics()
        pulled = 0
        for name in ref.names:
            c, _, _, ratio = ref.stats[name][t].tolist()
            got = metrics["layers"][name]
            s = ref.options[name].weight_decay * ratio
            pulled += s > 0
            assert abs(got["c"] - c) <= 1e-10 * abs(c) + 1e-15, f"step {t}, {name}: c {got['c']} for {c}"
            assert abs(got["s"] - s) <= 1e-9, f"step {t}, {name}: s {got['s']} for {s}"
            if c < 0:
                assert abs(got["r"] - ratio) <= 1e-9, f"step {t}, {name}: r {got['r']} for {ratio}"
            away = float((ref.params[t][name] - ref.anchors[name]).norm())
            size = float(ref.anchors[name].norm())
            assert abs(got["deviation"] - away) <= 1e-9 * away, f"step {t}, {name}: deviation"
            assert abs(got["deviation_rel"] - away / size) <= 1e-9, f"step {t}, {name}: relative deviation"
        assert metrics["num_layers"] == len(ref.names)
        assert abs(metrics["activation_rate"] - pulled / len(ref.names)) < 1e-12, f"step {t}: activation rate"
        assert metrics["nonfinite_layers"] == []
    for name, (away, size) in training.projector.deviation().items():
        want = float((ref.params[-1][name] - ref.anchors[name]).norm())
        assert abs(float(away) - want) <= 1e-9 * want
        assert abs(float(size) - float(ref.anchors[name].norm())) <= 1e-9 * float(size)


def uneven(engine: Engine, *, form: Form, idle_unit: bool = True) -> None:
    """Sizes that do not divide, shards that are empty, layers of one element, layers without a gradient.

    `idle_unit`: one step leaves all but the first layer out.
    """
    start = tensors(dtype=engine.dtype)
    most = tuple(SHAPES)[1:] if idle_unit else ("embed.weight", "head.weight")
    grads = gradients(start, 10, missing={2: ("block.attn.weight",), 3: ("one", "row.weight"), 6: most})
    follow(Training(engine, start, SPD, form=form), Oracle(start, start, SPD), grads)


def frozen(engine: Engine, *, form: Form) -> None:
    """A frozen layer is bound and left alone, on every rank."""
    start = tensors(dtype=engine.dtype)
    grads = gradients(start, 6, missing=dict.fromkeys(range(6), ("block.attn.weight", "conv.weight")))
    training = Training(engine, start, SPD, form=form, frozen=("block.attn.weight", "conv.weight"))
    follow(training, Oracle(start, start, SPD), grads)


def thawed(engine: Engine, *, form: Form) -> None:
    """A layer that was frozen when the optimizer was made is anchored where it was then."""
    start = tensors(dtype=engine.dtype)
    training = Training(engine, start, SPD, form=form, frozen=("block.attn.weight",))
    training.params["block.attn.weight"].requires_grad_(True)
    follow(training, Oracle(start, start, SPD), gradients(start, 6))


def tied(engine: Engine, *, form: Form) -> None:
    """A tied weight is one layer: both uses send gradients, it is pulled once."""
    start = {name: w for name, w in tensors(dtype=engine.dtype).items() if not name.startswith("head")}
    training = Training(engine, start, SPD, form=form, ties={"head.weight": "embed.weight"})
    assert "head.weight" not in training.params
    oracle, pulled = Oracle(start, start, SPD), 0
    for t, grads in enumerate(gradients(start, 8)):
        second = torch.roll(grads["embed.weight"], 1, 0)
        training.step({**grads, "head.weight": second})
        stats = oracle.step({**grads, "embed.weight": grads["embed.weight"] + second})
        pulled += stats["embed.weight"].s > 0
        assert_parity(training, oracle.weights, start, label=f"step {t}:")
    assert pulled >= 1


def mixed_dtypes(engine: Engine, *, form: Form) -> None:
    """float64, float32, bfloat16 and float16 layers in one optimizer, each as its own dtype has it."""
    dtypes = {"a": torch.float64, "b": torch.float32, "c": torch.bfloat16, "d": torch.float16}
    shapes = {
        f"{part}.{layer}": shape
        for part in dtypes
        for layer, shape in (("attn.weight", (5, 3)), ("bias", (3,)))
    }
    start = {name: w.to(dtypes[name[0]]) for name, w in tensors(shapes).items()}
    options = replace(SPD, eps=1e-4)  # 1e-8 is zero in float16
    training = Training(engine, start, options, form=form)
    oracle = BaseOracle(
        start,
        start,
        options,
        lambda params: torch.optim.Adam(params.values(), lr=options.lr, eps=options.eps),
    )
    # The base steps in the same dtype, so only the pull's rounding differs, in the last place of an element.
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
    for t, grads in enumerate(gradients(start, 8)):
        training.step(grads)
        oracle.step(grads)
        got = training.weights()
        for name, want in oracle.weights.items():
            assert got[name].dtype == want.dtype
            assert_layers_close(
                {name: got[name]}, {name: want}, relative=tolerance[want.dtype], label=f"step {t}:"
            )
        changed = float((got["c.attn.weight"] - start["c.attn.weight"]).abs().max())
    assert changed > 0


RULES = {
    "embed.weight": LayerOptions(lr=0.02, weight_decay=1.5),
    "block.attn.weight": LayerOptions(lr=0.01, weight_decay=0.7, betas=(0.8, 0.95)),
    "block.attn.bias": LayerOptions(lr=0.02, weight_decay=0.0),
    "block.norm.weight": LayerOptions(lr=0.02, weight_decay=3.0, rule="l2sp"),
    "block.mlp.weight": LayerOptions(lr=0.02, weight_decay=2.0, rule="l2sp"),
    "conv.weight": LayerOptions(lr=0.02, weight_decay=0.9, rule="decay"),
    "head.weight": LayerOptions(lr=0.03, weight_decay=5.0, rule="none"),
    "row.weight": LayerOptions(lr=0.02, weight_decay=2.5),
    "one": LayerOptions(lr=0.02, weight_decay=20.0, max_pull=0.25),
}


def rules(engine: Engine, *, form: Form) -> None:
    """Groups with their own rule, strength, bound on the pull, learning rate and betas in one optimizer."""
    start = tensors(dtype=engine.dtype)
    anchors = tensors(dtype=engine.dtype, seed=7)
    training = Training(engine, start, RULES, form=form, anchor=anchor_file(engine, anchors))
    follow(training, Oracle(start, anchors, RULES), gradients(start, 10))


def max_pull(engine: Engine, *, form: Form) -> None:
    """Lambda 20 reflects through the anchor, unless the pull is bounded.

    The bound is below 1: on the anchor itself the sign of the condition would be that of rounding.
    """
    start = tensors(dtype=engine.dtype)
    for bound in (None, 0.9):
        options = LayerOptions(lr=0.02, weight_decay=20.0, max_pull=bound)
        training = Training(engine, start, options, form=form)
        follow(training, Oracle(start, start, options), gradients(start, 6))


def file_anchor(engine: Engine, *, form: Form) -> None:
    """A bfloat16 checkpoint from which float64 training has moved away already."""
    start = tensors(dtype=engine.dtype)
    anchors = {name: w.bfloat16() for name, w in tensors(seed=3).items()}
    training = Training(engine, start, SPD, form=form, anchor=anchor_file(engine, anchors))
    follow(training, Oracle(start, anchors, SPD), gradients(start, 8))


def zero_anchor(engine: Engine, *, form: Form) -> None:
    """Anchored at zero: no stored values."""
    start = tensors(dtype=engine.dtype)
    follow(
        Training(engine, start, SPD, form=form, anchor="zero"), Oracle(start, {}, SPD), gradients(start, 8)
    )


def lambda_zero(engine: Engine, *, form: Form, foreach: bool) -> None:
    """Lambda 0 is torch's Adam to the last bit."""
    start = tensors(dtype=torch.float32)
    options = LayerOptions(lr=0.02)
    training = Training(engine, start, options, form=form, foreach=foreach)
    plain = engine.wrap(Probe(start))
    params = engine.named(plain)
    reference = torch.optim.Adam(params.values(), lr=0.02, foreach=foreach)
    index, count = engine.data_parallel
    for t, grads in enumerate(gradients(start, 5, missing={2: ("one",)})):
        training.step(grads)
        (plain(dict(grads)) * (float(count) if t % count == index else 0.0)).backward()
        reference.step()
        reference.zero_grad()
    assert_bits_equal(training.weights(), engine.weights(params))


def clipped(engine: Engine, *, form: Form) -> None:
    """Gradients clipped by their global norm: the oracle is fed what clipping left."""
    start = tensors(dtype=engine.clips)
    training = Training(engine, start, SPD, form=form)
    oracle, pulled = Oracle(start, start, SPD), 0
    for t, grads in enumerate(gradients(start, 8)):
        training.backward(grads)
        assert engine.clip(training.model, training.params, 0.5) > 0.5
        pulled += sum(stats.s > 0 for stats in oracle.step(training.gradients()).values())
        training.update()
        assert_parity(training, oracle.weights, start, label=f"step {t}:")
    assert pulled >= 3


def accumulated(engine: Engine, *, form: Form) -> None:
    """Two micro-batches without synchronisation, a third with it, one step."""
    start = tensors(dtype=engine.dtype)
    training = Training(engine, start, SPD, form=form)
    oracle = Oracle(start, start, SPD)
    pulled, drawn = 0, gradients(start, 18)
    for t in range(6):
        parts = drawn[3 * t : 3 * t + 3]
        for i, part in enumerate(parts):
            engine.no_sync(training.model, i < 2)
            training.backward(part)
        training.update()
        total = {name: parts[0][name] + parts[1][name] + parts[2][name] for name in start}
        pulled += sum(stats.s > 0 for stats in oracle.step(total).values())
        assert_parity(training, oracle.weights, start, label=f"step {t}:")
    assert pulled >= 3


def scheduled(engine: Engine, *, form: Form) -> None:
    """The learning rate of a scheduler reaches the step and the rules that use it."""
    start = tensors(dtype=engine.dtype)
    training = Training(engine, start, RULES, form=form)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(training.optimizer, T_max=8, eta_min=1e-4)
    oracle = Oracle(start, start, RULES)
    for t, grads in enumerate(gradients(start, 8)):
        share = scheduler.get_last_lr()[0] / RULES[next(iter(training.params))].lr
        assert t == 0 or share < 1.0
        rates = {id(p): group["lr"] for group in training.optimizer.param_groups for p in group["params"]}
        oracle.options = {name: replace(RULES[name], lr=rates[id(p)]) for name, p in training.params.items()}
        training.step(grads)
        scheduler.step()
        oracle.step(grads)
        assert_parity(training, oracle.weights, start, label=f"step {t}:")


def fused(engine: Engine, *, dtype: torch.dtype, mixed: bool = True) -> None:
    """Adam and the sums in one pass, beside layers that torch steps; with amsgrad and without."""
    for amsgrad in (False, True):
        start = tensors(dtype=dtype)
        of = dict.fromkeys(start, SPD)
        if mixed:
            of["block.mlp.weight"] = replace(SPD, rule="none")
            of["conv.weight"] = replace(SPD, rule="decay", weight_decay=0.01)
            of["head.weight"] = replace(SPD, rule="l2sp")
        training = Training(engine, start, of, form="adam_spd", fused=True, amsgrad=amsgrad)
        oracle, pulled = Oracle(start, start, of, amsgrad=amsgrad), 0
        missing = {3: ["embed.weight"], 4: list(start)[1:]} if mixed else {}
        for t, given in enumerate(gradients(start, 10, missing=missing)):
            training.step(given)
            pulled += sum(stats.s != 0 for stats in oracle.step(given).values())
            # The fused kernel takes its bias corrections in another order.
            relative = 1e-9 if dtype == torch.float64 else 2e-6
            assert_layers_close(training.weights(), oracle.weights, relative=relative, label=f"step {t}:")
        assert pulled >= 5


def scaled(engine: Engine, *, form: Form, fused: bool) -> None:
    """GradScaler, with an overflow at step 2, which is inert; `fused` leaves dividing to the optimizer."""
    start = tensors(dtype=torch.float32)
    training = Training(engine, start, SPD, form=form, fused=fused)
    oracle, pulled = Oracle(start, start, SPD), 0
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for t, grads in enumerate(gradients(start, 8)):
        given = dict(grads)
        if t == 2:
            given["block.attn.weight"] = torch.full_like(given["block.attn.weight"], torch.inf)
        before = training.weights()
        training.backward(given, scaler=scaler)
        scaler.step(training.optimizer)
        scaler.update()
        training.optimizer.zero_grad()
        training.steps += 1
        if t == 2:
            assert_bits_equal(training.weights(), before, label="the overflowing step:")
            assert scaler.get_scale() == 512.0
        else:
            pulled += sum(stats.s > 0 for stats in oracle.step(given).values())
        assert_float32_parity(training.weights(), oracle.weights, start, label=f"step {t}:")
    assert pulled >= 3


def inert(engine: Engine, *, form: Form) -> None:
    """Zero gradients at learning rate zero, as checkpoint libraries step: not a bit changes, nor later."""
    start = tensors(dtype=engine.dtype)
    training = Training(engine, start, SPD, form=form)
    rates = [group["lr"] for group in training.optimizer.param_groups]
    zero = {name: torch.zeros_like(w) for name, w in start.items()}
    # Later a layer comes back to where it began, so that its change is no measure for float32.
    grads = gradients(start, 6 if engine.dtype == torch.float64 else 4)
    for group in training.optimizer.param_groups:
        group["lr"] = 0.0
    training.step(zero)
    assert_bits_equal(training.weights(), start)
    for group, lr in zip(training.optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    oracle = Oracle(start, start, SPD)
    oracle.options = replace(SPD, lr=0.0)
    oracle.step(zero)
    oracle.options = SPD
    follow(training, oracle, grads)


def after_eval(engine: Engine, *, form: Form, reshard: bool) -> None:
    """The root's parameters are whole after an eval forward; binding then must find the shards."""
    start = tensors()
    drawn = gradients(start, 7)

    def evaluate(model: nn.Module) -> None:
        with torch.no_grad():
            model(dict(drawn[0]))
        if reshard and isinstance(model, FSDPModule):
            model.reshard()

    if reshard:
        training = Training(engine, start, SPD, form=form, prepare=evaluate)
        follow(training, Oracle(start, start, SPD), drawn[1:])
        return
    model = engine.wrap(Probe(start))
    params = engine.named(model)
    base = torch.optim.Adam(base_groups(params, dict.fromkeys(params, SPD)))
    evaluate(model)
    attach(base, model, config_of(dict.fromkeys(params, SPD)))
    oracle = Oracle(start, start, SPD)
    index, count = engine.data_parallel
    for t, grads in enumerate(drawn[1:]):
        (model(dict(grads)) * (float(count) if t % count == index else 0.0)).backward()
        base.step()
        base.zero_grad()
        oracle.step(grads)
        assert_float64_parity({name: engine.full(p) for name, p in params.items()}, oracle.weights)


def eval_between(engine: Engine, *, form: Form) -> None:
    """An eval forward before every step changes nothing."""
    start = tensors(dtype=engine.dtype)
    training = Training(engine, start, SPD, form=form)
    oracle = Oracle(start, start, SPD)
    for t, grads in enumerate(gradients(start, 6)):
        with torch.no_grad():
            training.model(dict(grads))
        training.step(grads)
        oracle.step(grads)
        assert_parity(training, oracle.weights, start, label=f"step {t}:")


def shard_dim1(engine: Engine, *, form: Form) -> None:
    """Weights split by columns."""
    shapes = {"a.weight": (3, 8), "a.bias": (3,), "b.weight": (5, 4, 2), "b.other": (1, 4)}
    start = tensors(shapes)
    engine.options["shard_placement_fn"] = lambda p: Shard(1) if p.ndim > 1 else None
    training = Training(engine, start, SPD, form=form)
    weight = training.params["a.weight"]
    assert isinstance(weight, DTensor)
    assert weight.placements == (Shard(1),)
    follow(training, Oracle(start, start, SPD), gradients(start, 8))
    anchors = {name: w.bfloat16() for name, w in tensors(shapes, seed=3).items()}
    training = Training(engine, start, SPD, form=form, anchor=anchor_file(engine, anchors))
    follow(training, Oracle(start, anchors, SPD), gradients(start, 8))


def uneven_strided(engine: Engine, *, form: Form) -> None:
    """Column-wise layers under FSDP2 with 7, 10 and 3 rows; different meshes in one optimizer."""
    shapes = {"block.attn.a": (7, 3), "block.attn.b": (10, 2), "block.attn.c": (3,), "conv.weight": (5, 2)}
    start = tensors(shapes)
    training = Training(engine, start, SPD, form=form)
    split = training.params["block.attn.a"]
    plain = training.params["conv.weight"]
    assert isinstance(split, DTensor)
    assert isinstance(plain, DTensor)
    assert split.device_mesh.ndim == 2
    assert plain.device_mesh.ndim == 1
    follow(training, Oracle(start, start, SPD), gradients(start, 12))
    anchors = tensors(shapes, seed=3)
    training = Training(engine, start, SPD, form=form, anchor=anchor_file(engine, anchors))
    follow(training, Oracle(start, anchors, SPD), gradients(start, 12))


def empty_tp_shard(engine: Engine, *, form: Form) -> None:
    """A layer of one row, split by rows over two ranks."""
    start = tensors({"block.attn.weight": (1, 6), "block.norm.weight": (3,), "conv.weight": (2, 2)})
    training = Training(engine, start, SPD, form=form)
    split = training.params["block.attn.weight"]
    assert isinstance(split, DTensor)
    assert split.to_local().numel() == (6 if engine.rank == 0 else 0)
    follow(training, Oracle(start, start, SPD), gradients(start, 12))


def partial_gradients(engine: Engine, *, form: Form) -> None:
    """What makes the norm layers of the other cases worth having: their gradients arrive Partial."""
    start = tensors()
    training = Training(engine, start, SPD, form=form)
    grads = gradients(start, 1)[0]
    training.backward(grads)
    norm = training.params["block.norm.weight"]
    assert isinstance(norm.grad, DTensor)
    assert norm.grad.placements[0].is_partial()
    training.update()
    oracle = Oracle(start, start, SPD)
    oracle.step(grads)
    assert_float64_parity(training.weights(), oracle.weights)


def two_meshes(engine: Engine, *, form: Form) -> None:
    """One part split over all ranks, another over half of them twice, in one optimizer."""
    shapes = {"a.weight": (5, 3), "a.bias": (3,), "b.weight": (3, 4), "b.bias": (6,)}
    start = tensors(shapes)
    flat = engine.mesh()  # type: ignore[attr-defined]
    square = init_device_mesh("cpu", (2, engine.world // 2), mesh_dim_names=("replicate", "shard"))

    def wrap(model: nn.Module) -> nn.Module:
        fully_shard(model.get_submodule("a"), mesh=flat)
        fully_shard(model.get_submodule("b"), mesh=square)
        return model

    engine.wrap = wrap  # type: ignore[method-assign]
    follow(Training(engine, start, SPD, form=form), Oracle(start, start, SPD), gradients(start, 8))


def ignored(engine: Engine, *, form: Form) -> None:
    """Parameters that FSDP2 ignores are plain tensors; all ranks give them the same gradient."""
    start = tensors()

    def wrap(model: nn.Module) -> nn.Module:
        return fully_shard(model, mesh=engine.mesh(), ignored_params={model.get_parameter("conv.weight")})  # type: ignore[attr-defined]

    engine.wrap = wrap  # type: ignore[method-assign]
    training = Training(engine, start, SPD, form=form)
    assert not isinstance(training.params["conv.weight"], DTensor)
    assert isinstance(training.params["block.attn.weight"], DTensor)
    oracle = Oracle(start, start, SPD)
    for t, grads in enumerate(gradients(start, 8)):
        training.model(dict(grads)).backward()
        training.update()
        oracle.step(grads)
        assert_float64_parity(training.weights(), oracle.weights, label=f"step {t}:")


def other_bases(engine: Engine, *, base: str) -> None:
    """The rule around other optimizers, on shards."""
    makers: dict[str, Any] = {
        "sgd": lambda groups: torch.optim.SGD([_only(g, "lr") for g in groups], momentum=0.9, nesterov=True),
        "adamw_foreach": lambda groups: torch.optim.AdamW(groups, weight_decay=0.0, foreach=True),
        "adamw_fused": lambda groups: torch.optim.AdamW(groups, weight_decay=0.0, fused=True),
        "rmsprop": lambda groups: torch.optim.RMSprop([_only(g, "lr", "eps") for g in groups]),
    }
    start = tensors()
    training = Training(engine, start, SPD, form="attached", make_base=makers[base])
    oracle = BaseOracle(
        start, start, SPD, lambda params: makers[base](base_groups(params, dict.fromkeys(params, SPD)))
    )
    follow(training, oracle, gradients(start, 8))


def _only(group: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: group[key] for key in ("params", *keys)}


def several_optimizers(engine: Engine) -> None:
    """One projector over two optimizers that share the model."""
    start = tensors(dtype=engine.dtype)
    model = engine.wrap(Probe(start))
    params = engine.named(model)
    names = list(params)
    first = torch.optim.Adam([params[n] for n in names[::2]], lr=0.02)
    second = torch.optim.SGD([params[n] for n in names[1::2]], lr=0.05, momentum=0.5)
    attach([first, second], model, SPDConfig(weight_decay=1.5))
    oracles = [
        BaseOracle(
            {n: start[n] for n in names[::2]}, start, SPD, lambda p: torch.optim.Adam(p.values(), lr=0.02)
        ),
        BaseOracle(
            {n: start[n] for n in names[1::2]},
            start,
            SPD,
            lambda p: torch.optim.SGD(p.values(), lr=0.05, momentum=0.5),
        ),
    ]
    index, count = engine.data_parallel
    for t, grads in enumerate(gradients(start, 8)):
        (model(dict(grads)) * (float(count) if t % count == index else 0.0)).backward()
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
        want: dict[str, Tensor] = {}
        for oracle in oracles:
            oracle.step({name: grads[name] for name in oracle.params})
            want.update(oracle.weights)
        assert_as_good(engine.weights(params), want, start, label=f"step {t}:")


def ranks_bit_equal(engine: Engine) -> None:
    """Replicas agree to the last bit, also where ranks run with different numbers of threads."""
    torch.set_num_threads(1 + engine.rank % 2)
    start = tensors({"a.weight": (700, 501), "a.bias": (100_003,), "b": (5,)}, dtype=torch.float32)
    training = Training(engine, start, SPD)
    pulled = 0
    for grads in gradients(start, 5):
        training.step(grads)
        pulled += sum(layer["s"] > 0 for layer in training.projector.metrics()["layers"].values())
    assert pulled >= 1
    for name, mine in training.weights().items():
        theirs = [torch.empty_like(mine) for _ in range(engine.world)]
        dist.all_gather(theirs, mine)
        for rank, other in enumerate(theirs):
            assert torch.equal(mine, other), f"{name} differs between ranks {engine.rank} and {rank}"
    torch.set_num_threads(1)


class Tiny(nn.Module):
    """A block as users write them, for the parallel styles of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Pre-norm, residual left out."""
        return self.down(torch.tanh(self.up(self.norm(x))))


def real_block(engine: Engine) -> None:
    """torch's own parallel styles with sequence parallelism; the oracle is fed the gradients that arrive."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    torch.manual_seed(1)
    model = Tiny().double()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    mesh = init_device_mesh("cpu", (engine.world // 2, 2), mesh_dim_names=("dp", "tp"))
    plan = {
        "norm": SequenceParallel(sequence_dim=1),
        "up": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1)),
        "down": RowwiseParallel(output_layouts=Replicate()),
        "": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1)),
    }
    parallelize_module(model, mesh["tp"], {k: v for k, v in plan.items() if k})
    parallelize_module(model, mesh["tp"], plan[""])
    if engine.world > 2:
        fully_shard(model, mesh=mesh["dp"])
    optimizer = AdamSPD(model.named_parameters(), lr=0.02, weight_decay=1.5)
    oracle, pulled = Oracle(start, start, SPD), 0
    params = dict(model.named_parameters())
    for t in range(8):
        generator = torch.Generator().manual_seed(100 * t + mesh.get_local_rank("dp"))
        x = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
        y = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
        out = model(x)
        ((out - y) ** 2).mean().backward()
        seen = {name: engine.full(p.grad) for name, p in params.items() if p.grad is not None}
        assert set(seen) == set(start)
        pulled += sum(stats.s > 0 for stats in oracle.step(seen).values())
        optimizer.step()
        optimizer.zero_grad()
        got = {name: engine.full(p) for name, p in params.items()}
        assert_float64_parity(got, oracle.weights, label=f"step {t}:")
    assert pulled >= 3


def by_pattern(engine: Engine) -> None:
    """Names of wrappers are resolved: patterns match the model's own names."""
    start = tensors(dtype=engine.dtype)
    model = engine.wrap(Probe(start))
    params = engine.named(model)
    base = torch.optim.Adam(model.parameters(), lr=0.02)
    layers = (
        {"pattern": re.escape("block.attn.weight"), "weight_decay": 0.0},
        {"pattern": ".*norm.*", "rule": "none"},
    )
    from sharded_spd import load_config

    attach(base, model, load_config({"weight_decay": 1.5, "layers": list(layers)}))
    plain = LayerOptions(lr=0.02)
    options = {name: plain if name in ("block.attn.weight", "block.norm.weight") else SPD for name in start}
    oracle = Oracle(start, start, options)
    index, count = engine.data_parallel
    for t, grads in enumerate(gradients(start, 6)):
        (model(dict(grads)) * (float(count) if t % count == index else 0.0)).backward()
        base.step()
        base.zero_grad()
        oracle.step(grads)
        assert_as_good(engine.weights(params), oracle.weights, start, label=f"{t}:")


def pre_tensors(engine: Engine) -> None:
    """The published form of a group: `pre` holds an anchor per parameter, or None."""
    start, anchors = tensors(), tensors(seed=5)
    model = engine.wrap(Probe(start))
    params = engine.named(model)
    names = list(params)
    placed = engine.named(engine.wrap(Probe(anchors)))
    optimizer = AdamSPD(
        [
            {"params": [params[n] for n in names[:4]], "pre": [placed[n].detach() for n in names[:4]]},
            {"params": [params[n] for n in names[4:]], "pre": None},
        ],
        lr=0.02,
        weight_decay=1.5,
    )
    oracle = Oracle(start, {n: anchors[n] for n in names[:4]}, SPD)
    index, count = engine.data_parallel
    for t, grads in enumerate(gradients(start, 8)):
        (model(dict(grads)) * (float(count) if t % count == index else 0.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        oracle.step(grads)
        assert_float64_parity(
            {name: engine.full(p) for name, p in params.items()}, oracle.weights, label=f"{t}:"
        )
    for group in optimizer.param_groups:
        assert "pre" not in group
