"""What DeepSpeed has to do as the oracle does; each function runs on every rank of a launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import sharded_spd.projection.reduction
from sharded_spd import SPDConfig, attach
from sharded_spd.config import AnchorConfig, LayerConfig
from sharded_spd.errors import AnchorError
from sharded_spd.integrations.deepspeed import load_checkpoint, save_checkpoint
from tests.parity.cases import SPD, gradients, tensors
from tests.reference.golden import read_golden
from tests.reference.oracle import BaseOracle, LayerOptions, Oracle
from tests.support.compare import assert_bits_equal, assert_float32_parity, assert_layers_close
from tests.support.engines import Engine
from tests.support.models import Probe
from tests.support.refusals import refused
from tests.support.training import anchor_file, config_of
from tests.support.zero import Setting, ZeroTraining

GROUPS = {
    "embed.weight": LayerOptions(lr=0.02, weight_decay=1.5),
    "block.attn.weight": LayerOptions(lr=0.01, weight_decay=0.7, betas=(0.8, 0.95)),
    "block.attn.bias": LayerOptions(lr=0.01, weight_decay=0.7, betas=(0.8, 0.95)),
    "block.norm.weight": LayerOptions(lr=0.02, weight_decay=3.0, rule="l2sp"),
    "block.mlp.weight": LayerOptions(lr=0.02, weight_decay=1.5),
    "conv.weight": LayerOptions(lr=0.02, weight_decay=0.9, rule="decay"),
    "head.weight": LayerOptions(lr=0.02, weight_decay=5.0, rule="none"),
    "row.weight": LayerOptions(lr=0.03, weight_decay=2.5),
    "one": LayerOptions(lr=0.02, weight_decay=20.0, max_pull=0.25),
}
"""Rules that share a flat, and several groups."""


TWO_GROUPS = {**GROUPS, "row.weight": GROUPS["embed.weight"]}
"""DeepSpeed cannot load a universal checkpoint on a rank that holds nothing of a group."""


def rounded(given: Mapping[str, Tensor], setting: Setting) -> dict[str, Tensor]:
    """Float32 values that the setting's dtype holds exactly."""
    return {name: t.to(setting.torch_dtype).float() for name, t in given.items()}


def drawn(setting: Setting, steps: int, skip: Sequence[str] = ()) -> list[dict[str, Tensor]]:
    """Random gradients that arrive to the last bit."""
    like = {name: w for name, w in tensors(dtype=torch.float32).items() if name not in skip}
    return [rounded(grads, setting) for grads in gradients(like, steps)]


def compare(
    training: ZeroTraining, oracle: Oracle | BaseOracle, start: Mapping[str, Tensor], label: str = ""
) -> None:
    """Float32 as DESIGN has it; below low-precision weights the masters within 5e-6."""
    got = training.masters()
    if training.setting.dtype == "fp32":
        assert_float32_parity(got, oracle.weights, start, label=label)
    else:
        assert_layers_close(got, oracle.weights, relative=5e-6, label=label)


def follow(
    training: ZeroTraining,
    oracle: Oracle | BaseOracle,
    start: Mapping[str, Tensor],
    grads: Sequence[Mapping[str, Tensor]],
    scale: float = 1.0,
) -> None:
    """Both take the same steps and agree; the oracle's gradients are `scale` of those sent."""
    pulled = 0
    for given in grads:
        training.step(given)
        stats = oracle.step({name: g * scale for name, g in given.items()})
        pulled += sum(one.s != 0 for one in stats.values())
    compare(training, oracle, start)
    assert pulled >= 3, f"the case pulls only {pulled} times and shows nothing"
    rate = training.projector.metrics()["activation_rate"]
    assert 0 <= rate <= 1
    assert training.projector.num_steps == len(grads)


def golden(engine: Engine, *, setting: Setting, stem: str) -> None:
    """A golden trajectory; a layer without a gradient arrives as zeros, and Adam moves on.

    At stage 3 DeepSpeed does not clear its buffer, and hands on the layer's last gradient once more.
    """
    ref = read_golden(stem)
    start = {name: w.float() for name, w in ref.init.items()}
    anchor: Any = "zero" if ref.zero_anchor else "snapshot"
    if stem == "spd_resumed":
        anchor = anchor_file(engine, {name: w.float() for name, w in ref.anchors.items()})
    base = _Amsgrad if ref.amsgrad else torch.optim.Adam
    training = ZeroTraining(
        start, ref.options, replace(setting, base=base), config=config_of(ref.options, anchor)
    )
    oracle = Oracle(start, ref.anchors, ref.options, amsgrad=ref.amsgrad)
    complete = all(set(grads) == set(start) for grads in ref.grads)
    arrives = {name: torch.zeros_like(w) for name, w in start.items()}
    for grads in ref.grads:
        given = {name: g.float() for name, g in grads.items()}
        training.step(given)
        arrives = {**(arrives if setting.stage == 3 else dict.fromkeys(start)), **given}
        oracle.step({n: torch.zeros_like(start[n]) if g is None else g for n, g in arrives.items()})
    want = ref.params[-1] if complete else oracle.weights
    assert_float32_parity(training.masters(), want, start)
    training.close()


class _Amsgrad(torch.optim.Adam):
    def __init__(self, params: Any) -> None:
        super().__init__(params, amsgrad=True)


def agrees(
    engine: Engine, *, setting: Setting, grouped: bool = False, per_step: bool = False, file: bool = False
) -> None:
    """Uneven layers, one of one element; `grouped`: rules that mix in one flat, and several groups."""
    start = rounded(tensors(dtype=torch.float32), setting)
    options = {name: GROUPS[name] if grouped else SPD for name in start}
    other = rounded(tensors(seed=7, dtype=torch.float32), setting)
    anchor: Any = anchor_file(engine, other) if file else "snapshot"
    config = None if setting.form == "adam_spd" and not file else config_of(options, anchor)
    if config is not None and per_step:
        config = replace(config, reduction="per_step")
    training = ZeroTraining(start, options, setting, config=config)
    oracle: Oracle | BaseOracle = Oracle(start, other if file else start, options)
    if hasattr(training.engine.optimizer, "fp32_groups"):  # DeepSpeed stepped once while it made the engine
        oracle.step({name: torch.zeros_like(w) for name, w in start.items()})
    follow(training, oracle, start, drawn(setting, 8))
    assert_replicas(training)
    training.close()


def assert_replicas(training: ZeroTraining) -> None:
    """The model computes with the masters, rounded, on every rank."""
    masters = training.masters()
    import deepspeed

    params = dict(training.engine.module.named_parameters())
    for name, p in params.items():
        with deepspeed.zero.GatheredParameters([p], enabled=training.setting.stage == 3):
            assert torch.equal(p.detach().float(), masters[name].to(p.dtype).float()), name


def clipped(engine: Engine, *, setting: Setting) -> None:
    """Clipping that bites: the condition and the moments are of what the optimizer gets."""
    start = rounded(tensors(dtype=torch.float32), setting)
    training = ZeroTraining(start, SPD, setting, config=config_of(dict.fromkeys(start, SPD)))
    oracle = Oracle(start, start, SPD)
    for grads in drawn(setting, 8):
        norm = float(torch.stack([g.double().norm() for g in grads.values()]).norm())
        assert norm > setting.clip
        training.step(grads)
        oracle.step({name: g * (setting.clip / (norm + 1e-6)) for name, g in grads.items()})
    compare(training, oracle, start)
    training.close()


def frozen_and_tied(engine: Engine, *, setting: Setting) -> None:
    """A frozen layer inside a group is left alone; a tied weight is one layer."""
    shapes = tensors(dtype=torch.float32)
    start = {n: w for n, w in rounded(shapes, setting).items() if n != "head.weight"}
    hidden = ("block.attn.bias", "conv.weight")
    training = ZeroTraining(
        start,
        SPD,
        setting,
        config=SPDConfig(weight_decay=SPD.weight_decay),
        ties={"head.weight": "embed.weight"},
        frozen=hidden,
    )
    live = {n: w for n, w in start.items() if n not in hidden}
    oracle = Oracle(live, live, SPD)
    for grads in drawn(setting, 8, skip=(*hidden, "head.weight")):
        second = torch.roll(grads["embed.weight"], 1, 0)
        training.step({**grads, "head.weight": second})
        oracle.step({**grads, "embed.weight": grads["embed.weight"] + second})
    compare(training, oracle, live)
    assert set(training.projector.metrics()["layers"]) == set(live)
    training.close()


def settings_in_json(engine: Engine, *, setting: Setting) -> None:
    """The block "sharded_spd" says everything; an optimizer that the JSON names."""
    start = rounded(tensors(dtype=torch.float32), setting)
    zero_head = {"pattern": "head\\..*", "anchor": "zero"}
    block = {"weight_decay": 1.5, "reduction": "per_step", "layers": [zero_head]}
    params = {"lr": SPD.lr, "weight_decay": 0.0, "torch_adam": True}
    setting = replace(
        setting,
        block={"type": "AdamW", "params": params},
        top={**setting.top, "sharded_spd": block},
        folder=engine.scratch if engine.world == 2 else None,
    )
    training = ZeroTraining(start, SPD, setting)
    anchors = {n: torch.zeros_like(w) if n == "head.weight" else w for n, w in start.items()}
    follow(training, Oracle(start, anchors, SPD), start, drawn(setting, 8))
    held = training.projector.export_anchors()
    assert held["head.weight"].values is None
    other = SPDConfig(weight_decay=3.0)
    training.projector.detach()
    refused(engine, lambda: attach(training.engine, config=other), (ValueError,), "in one place")
    training.engine.destroy()


def other_base(engine: Engine, *, setting: Setting, name: str) -> None:
    """Bases with kernels of their own, and one without a second moment."""
    params = {"lr": SPD.lr, "weight_decay": 0.0}
    momentum = {"lr": SPD.lr, "momentum": 0.9}
    block = {"type": name, "params": momentum if name == "SGD" else params}
    start = rounded(tensors(dtype=torch.float32), setting)
    config = config_of(dict.fromkeys(start, SPD))
    training = ZeroTraining(start, SPD, replace(setting, block=block), config=config)
    make = torch.optim.SGD if name == "SGD" else torch.optim.AdamW
    extra = momentum if name == "SGD" else params
    oracle = BaseOracle(start, start, SPD, lambda named: make(list(named.values()), **extra))
    follow(training, oracle, start, drawn(setting, 8))
    training.close()


def master_weights(engine: Engine, *, setting: Setting) -> None:
    """Masters in bfloat16: each step is the oracle's, to a rounding of the stored weights."""
    start = rounded(tensors(dtype=torch.float32), setting)
    training = ZeroTraining(start, SPD, setting, config=config_of(dict.fromkeys(start, SPD)))
    low = {name: w.to(torch.bfloat16) for name, w in start.items()}
    oracle = BaseOracle(low, start, SPD, lambda named: torch.optim.Adam(named.values(), lr=SPD.lr))
    for given in drawn(setting, 6):
        training.step(given)
        oracle.step(given)
    want = {name: w.float() for name, w in oracle.weights.items()}
    assert_layers_close(training.masters(), want, relative=1e-2)
    plain = BaseOracle(
        low, start, replace(SPD, weight_decay=0.0), lambda n: torch.optim.Adam(n.values(), lr=SPD.lr)
    )
    for given in drawn(setting, 6):
        plain.step(given)
    got = training.masters()
    closer = sum(
        float((got[n] - want[n]).norm()) < float((got[n] - plain.weights[n].float()).norm()) for n in want
    )
    assert closer > len(want) // 2, "the projection does not show"
    assert {a.values.dtype for a in training.projector.export_anchors().values()} == {torch.bfloat16}
    training.close()


def overflows(engine: Engine, *, setting: Setting) -> None:
    """Infinity on one rank, twice: all skip the step, nothing is counted, and training goes on."""
    start = rounded(tensors(dtype=torch.float32), setting)
    training = ZeroTraining(start, SPD, setting, config=config_of(dict.fromkeys(start, SPD)))
    oracle, taken = Oracle(start, start, SPD), 0
    for t, grads in enumerate(drawn(setting, 10)):
        if t in (1, 3):
            before, fingerprint = training.masters(), training.projector.fingerprint
            training.step({**grads, "conv.weight": torch.full_like(grads["conv.weight"], torch.inf)})
            assert_bits_equal(training.masters(), before, label=f"step {t}:")
            assert training.projector.fingerprint == fingerprint
        else:
            training.step(grads)
            oracle.step(grads)
            taken += 1
        assert training.projector.num_steps == taken
    compare(training, oracle, start)
    training.close()


def collectives(engine: Engine, *, setting: Setting, inner_steps: int) -> None:
    """One all-reduce per inner step, or per engine step; bit for bit the same weights."""
    start = rounded(tensors(dtype=torch.float32), setting)
    results = []
    for per_step in (False, True):
        config = replace(config_of(GROUPS), reduction="per_step" if per_step else "per_inner_step")
        training = ZeroTraining(start, GROUPS, setting, config=config)
        wrapper, names = training.engine.optimizer, training.engine.param_names
        parts = wrapper.fp16_groups if setting.stage == 3 else wrapper.bit16_groups
        assert len(parts) >= inner_steps
        pulled = [part for part in parts if any(GROUPS[names[p]].rule == "spd" for p in part)]
        wanted = 1 if per_step else len(pulled)
        for t, grads in enumerate(drawn(setting, 6)):
            with _Counted() as sizes:
                training.step(grads)
            if t > 0:  # the guard is settled
                assert len(sizes) == wanted, f"step {t}: {sizes}"
                assert sum(sizes) <= 8 * len(start)
        results.append(training.masters())
        assert_replicas(training)
        training.close()
    assert_bits_equal(results[1], results[0])


class _Counted:
    """Payloads of the package's own reductions in a block."""

    def __enter__(self) -> list[int]:
        self._real = sharded_spd.projection.reduction.sum_over_
        sizes: list[int] = []

        def counted(payload: Tensor, scope: Any) -> None:
            sizes.append(payload.numel())
            self._real(payload, scope)

        sharded_spd.projection.reduction.sum_over_ = counted
        return sizes

    def __exit__(self, *_: object) -> None:
        sharded_spd.projection.reduction.sum_over_ = self._real


def anchors(engine: Engine, *, setting: Setting) -> None:
    """This rank's partition only, in the model's dtype; the same fingerprint as on one process."""
    start = rounded(tensors(dtype=torch.float32), setting)
    training = ZeroTraining(start, SPD, setting, config=SPDConfig())
    held = training.projector.export_anchors()
    numel = sum(anchor.values.numel() for anchor in held.values())
    assert {anchor.values.dtype for anchor in held.values()} == {setting.torch_dtype}
    most = torch.tensor(numel)
    dist.all_reduce(most)
    assert int(most) == sum(w.numel() for w in start.values()), "the ranks' anchors are not one model"
    model = Probe(start)
    whole = attach(torch.optim.Adam(model.parameters()), model)
    assert training.projector.fingerprint == whole.fingerprint
    for name, (away, size) in training.projector.deviation().items():
        assert away == 0
        assert abs(size - float(start[name].double().norm())) <= 1e-9 * size
    training.close()


def resumes(engine: Engine, *, setting: Setting) -> None:
    """Saved and loaded at the same world size: bit for bit; with another anchor every rank raises."""
    start = rounded(tensors(dtype=torch.float32), setting)
    config, folder, grads = config_of(GROUPS), str(engine.scratch / "saved"), drawn(setting, 8)
    first = ZeroTraining(start, GROUPS, setting, config=config)
    for given in grads[:4]:
        first.step(given)
    save_checkpoint(first.engine, first.projector, folder, tag="t", client_state={"mine": 7})
    for given in grads[4:]:
        first.step(given)
    want = first.masters()
    first.close()
    for own_state in (True, False):
        again = ZeroTraining(start, GROUPS, setting, config=config)
        if own_state:
            path, client = load_checkpoint(again.engine, again.projector, folder, tag="t")
            assert path is not None
            assert client["mine"] == 7
            assert again.projector.num_steps == 4
        else:
            again.engine.load_checkpoint(folder, tag="t")
        again.steps = 4
        for given in grads[4:]:
            again.step(given)
        assert_bits_equal(again.masters(), want)
        again.close()
    other = rounded(tensors(seed=3, dtype=torch.float32), setting)
    wrong = ZeroTraining(other, GROUPS, setting, config=config)
    refused(engine, lambda: wrong.engine.load_checkpoint(folder, tag="t"), (AnchorError,), "another anchor")
    other_state = replaced_fingerprint(wrong.projector.state_dict())
    refused(engine, lambda: wrong.projector.load_state_dict(other_state), (AnchorError,), "another anchor")
    wrong.close()
    plain = ZeroTraining(start, SPD, setting, config=config)
    plain.projector.detach()
    for given in grads[:3]:
        plain.step(given)
    plain.engine.save_checkpoint(folder, tag="plain")
    plain.engine.destroy()
    adopted = ZeroTraining(start, SPD, setting, config=config)
    adopted.engine.load_checkpoint(folder, tag="plain")
    adopted.step(grads[3])
    adopted.close()


def replaced_fingerprint(state: Mapping[str, Any]) -> dict[str, Any]:
    """As a run with another anchor would have it."""
    return {**state, "fingerprint": "0" + state["fingerprint"][1:] + "x"}


def saves_for_universal(engine: Engine, *, setting: Setting, folder: str) -> None:
    """Half of a run, with a schedule, saved; the whole of it as the reference."""
    start = rounded(tensors(dtype=torch.float32), setting)
    training = ZeroTraining(start, TWO_GROUPS, _scheduled(setting), config=config_of(TWO_GROUPS))
    for t, given in enumerate(drawn(setting, 9)):
        if t == 4:
            save_checkpoint(training.engine, training.projector, folder, tag="t")
        training.step(given)
    if engine.rank == 0:
        rates = [group["lr"] for group in training.base.param_groups]
        torch.save({"weights": training.masters(), "rates": rates}, f"{folder}/reference.pt")
    else:
        training.masters()
    training.close()


def loads_universal(engine: Engine, *, setting: Setting, folder: str) -> None:
    """The other half at another world size: the groups' own settings, the schedule's lr, the same weights."""
    start = rounded(tensors(dtype=torch.float32), setting)
    setting = replace(_scheduled(setting), top={"checkpoint": {"load_universal": True}})
    training = ZeroTraining(start, TWO_GROUPS, setting, config=config_of(TWO_GROUPS))
    path, _ = load_checkpoint(training.engine, training.projector, folder, tag="universal")
    assert path is not None
    training.steps = 4
    for given in drawn(setting, 9)[4:]:
        training.step(given)
    reference = torch.load(f"{folder}/reference.pt", weights_only=True)
    assert [group["lr"] for group in training.base.param_groups] == pytest.approx(reference["rates"])
    assert len({group["betas"] for group in training.base.param_groups}) == 2
    assert_float32_parity(training.masters(), reference["weights"], start)
    training.close()


def _scheduled(setting: Setting) -> Setting:
    return replace(
        setting, scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    )


def of_pattern(engine: Engine, *, setting: Setting) -> None:
    """A pattern speaks of a layer wherever it lies; one that matches nothing raises everywhere."""
    start = rounded(tensors(dtype=torch.float32), setting)
    inner = LayerConfig(pattern=r"block\..*", rule="none")
    layers = (inner, LayerConfig(pattern="one", anchor=AnchorConfig(source="zero")))
    training = ZeroTraining(start, SPD, setting, config=SPDConfig(weight_decay=1.5, layers=layers))
    options = {n: replace(SPD, rule="none") if n.startswith("block.") else SPD for n in start}
    oracle = Oracle(start, {n: w for n, w in start.items() if n != "one"}, options)
    follow(training, oracle, start, drawn(setting, 8))
    training.projector.detach()
    wrong = SPDConfig(layers=(LayerConfig(pattern="nowhere", rule="none"),))
    refused(engine, lambda: attach(training.engine, config=wrong), (ValueError,), "nowhere")
    training.engine.destroy()
