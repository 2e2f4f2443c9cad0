"""The anchor is what it is said to be: snapshots, frozen layers, bindings that change under the optimizer."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sharded_spd import AdamSPD, SPDConfig, attach
from tests.support.local import LAMBDA, LR, give, gradients, layers, parameters, values


def _spd(params: Any, **options: Any) -> AdamSPD:
    return AdamSPD(params, lr=LR, weight_decay=LAMBDA, **options)


def _load(params: dict[str, nn.Parameter]) -> None:
    """Other weights, as a checkpoint brings them."""
    with torch.no_grad():
        for p in params.values():
            p.add_(1.0)


def test_guard_fires_in_a_warm_up_from_zero_and_stays() -> None:
    """The first learning rate of a warm-up is 0: its step makes Adam's state, but is no excuse."""
    params = parameters(layers())
    optimizer = _spd(params.items())
    _load(params)
    for given, lr in zip(gradients(3), (0.0, LR, LR), strict=True):
        optimizer.param_groups[0]["lr"] = lr
        give(params, given)
        with pytest.raises(ValueError, match="loaded after the snapshot"):
            optimizer.step()


def test_guard_outlives_a_group_added_before_the_first_step() -> None:
    params = parameters(layers())
    pairs = list(params.items())
    optimizer = _spd(pairs[:2])
    _load(dict(pairs[:2]))
    optimizer.add_param_group({"params": pairs[2:]})
    give(params, gradients(1)[0])
    with pytest.raises(ValueError, match=pairs[0][0]):
        optimizer.step()


def test_resume_without_base_state_is_vouched_for_by_the_projector() -> None:
    """SGD has no state that would tell a resumed run from weights loaded by mistake."""
    params = parameters(layers())
    base = torch.optim.SGD(params.items(), lr=LR)
    projector = attach(base, config=SPDConfig(weight_decay=LAMBDA))
    for given in gradients(3):
        give(params, given)
        base.step()
    others = parameters(layers())
    fresh = torch.optim.SGD(others.items(), lr=LR)
    resumed = attach(fresh, config=SPDConfig(weight_decay=LAMBDA))
    with torch.no_grad():
        for name, p in others.items():
            p.copy_(params[name])
    resumed.load_state_dict(projector.state_dict())
    for given in gradients(5)[3:]:
        give(params, given)
        give(others, given)
        base.step()
        fresh.step()
    assert all(torch.equal(params[name], p) for name, p in others.items())


@pytest.mark.parametrize("source", ["snapshot", "file"])
def test_frozen_layer_that_is_loaded_and_then_thawed(source: str, tmp_path: Any) -> None:
    """Its weight is its anchor no more: a file is read again, a snapshot is lost and says so."""
    start = layers()
    save_file(start, tmp_path / "anchor.safetensors")
    params = parameters(start)
    params["body.weight"].requires_grad_(False)
    anchor = tmp_path / "anchor.safetensors" if source == "file" else "snapshot"
    optimizer = _spd(params.items(), anchor=anchor)
    _load({"body.weight": params["body.weight"]})
    params["body.weight"].requires_grad_(True)
    give(params, gradients(1)[0])
    if source == "snapshot":
        with pytest.raises(ValueError, match=r"frozen.*body\.weight"):
            optimizer.step()
        return
    optimizer.step()
    want = float((params["body.weight"].detach() - start["body.weight"]).norm())
    assert optimizer.projector.deviation()["body.weight"][0] == pytest.approx(want, rel=1e-12)


def test_names_that_come_later_keep_the_anchors() -> None:
    model = nn.Linear(3, 2)
    optimizer = _spd(list(model.parameters()))
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    before = sorted(d for d, _ in optimizer.projector.deviation().values())
    optimizer.bind(model)
    after = optimizer.projector.deviation()
    assert set(after) == {"weight", "bias"}
    assert sorted(d for d, _ in after.values()) == before
    assert before[0] > 0


def test_a_frozen_layer_that_is_loaded_before_the_next_binding_has_another_anchor() -> None:
    params = parameters(layers())
    name, frozen = next(iter(params.items()))
    frozen.requires_grad_(False)
    optimizer = _spd(params.items())
    _load({name: frozen})
    with pytest.raises(ValueError, match=rf"^layer '{name}': another anchor than that of the binding before"):
        optimizer.bind()


def test_no_step_uses_a_binding_that_failed() -> None:
    params = parameters(layers())
    optimizer = _spd(params.items())
    give(params, gradients(1)[0])
    optimizer.step()
    stray = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    optimizer.param_groups[0]["params"].append(stray)
    with pytest.raises(TypeError, match="complex"):
        optimizer.bind()
    before = values(params)
    with pytest.raises(TypeError, match="complex"):
        optimizer.step()
    assert all(torch.equal(before[name], p) for name, p in params.items())


def test_state_loaded_before_the_first_binding_is_checked_there() -> None:
    params = parameters(layers())
    saved = _spd(params.items()).state_dict()
    others = parameters(layers(seed=5))
    optimizer = _spd(others.items(), anchor="deferred")
    optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="group 0: another anchor than the checkpoint's"):
        optimizer.bind()


def test_detached_projector_does_not_come_back() -> None:
    params = parameters(layers())
    base = torch.optim.Adam(params.items(), lr=LR)
    projector = attach(base, config=SPDConfig())
    projector.detach()
    with pytest.raises(RuntimeError, match="detached"):
        projector.bind()


def test_given_tensors_are_let_go() -> None:
    params = parameters(layers())
    pre = [w.clone() for w in layers().values()]
    watched = [weakref.ref(w) for w in pre]
    optimizer = _spd([{"params": list(params.items()), "pre": pre}])
    del pre
    gc.collect()
    assert not any(w() is not None for w in watched)
    assert optimizer.projector.bound


def test_copy_without_any_anchor_steps_on() -> None:
    params = parameters(layers())
    optimizer = _spd(params.items(), rule="decay")
    other = copy.deepcopy(optimizer)
    for p in other.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    other.step()
    assert other.projector.bound


def test_plain_adam_checkpoint_leaves_lambda_alone() -> None:
    """Its weight_decay is not lambda."""
    params = parameters(layers())
    plain = torch.optim.Adam(params.items(), lr=0.5)
    optimizer = _spd(params.items(), max_pull=0.7)
    optimizer.load_state_dict(plain.state_dict())
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["max_pull"]) == (0.5, LAMBDA, 0.7)


def test_infinite_weight_is_not_made_nan() -> None:
    p = nn.Parameter(torch.tensor([1.0, -torch.inf]))
    optimizer = _spd([("p", p)], rule="l2sp", anchor="zero")
    for _ in range(3):
        p.grad = torch.ones(2)
        optimizer.step()
    assert p[1] == -torch.inf
    assert torch.isfinite(p[0])


def test_closure_that_is_never_evaluated_raises() -> None:
    class Lazy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step()

    params = parameters(layers())
    base = Lazy(params.values(), lr=LR)
    attach(base, config=SPDConfig())
    give(params, gradients(1)[0])
    with pytest.raises(RuntimeError, match="closure"):
        base.step(lambda: None)


def test_without_a_learning_rate_there_is_a_sentence() -> None:
    params = parameters(layers())
    base = torch.optim.SGD(params.values(), lr=LR)
    attach(base, config=SPDConfig())
    base.param_groups[0]["lr"] = None
    give(params, gradients(1)[0])
    with pytest.raises(TypeError, match=r"learning rate"):
        base.step()


def test_a_layer_that_rests_has_no_deviation_in_the_metrics() -> None:
    params = parameters(layers())
    optimizer = _spd(params.items())
    given = gradients(1)[0]
    del given["body.weight"]
    give(params, given)
    optimizer.step()
    own = optimizer.projector.metrics()["layers"]
    assert "deviation" not in own["body.weight"]
    assert own["embed.weight"]["deviation"] > 0


def test_steps_are_counted_where_only_one_of_two_optimizers_steps() -> None:
    params = parameters(layers())
    pairs = list(params.items())
    bases = [torch.optim.SGD(pairs[:2], lr=LR), torch.optim.SGD(pairs[2:], lr=LR)]
    projector = attach(bases, config=SPDConfig())
    for given in gradients(4):
        give(params, given)
        bases[0].step()
    assert projector.num_steps == 3  # a round is known to be over when the next one begins


def _resume(params: dict[str, nn.Parameter], base: torch.optim.Optimizer) -> dict[str, Any]:
    for given in gradients(3):
        give(params, given)
        base.step()
    return copy.deepcopy(base.state_dict())


@pytest.mark.parametrize("order", ["attach first", "state first"])
def test_fine_tuned_weights_that_attach_takes_for_pre_trained_raise(order: str) -> None:
    params = parameters(layers())
    saved = _resume(params, torch.optim.Adam(params.items(), lr=LR))
    others = parameters(values(params))
    base = torch.optim.Adam(others.items(), lr=LR)
    if order == "state first":
        base.load_state_dict(saved)
    projector = attach(base, config=SPDConfig(weight_decay=LAMBDA))
    if order == "attach first":
        base.load_state_dict(saved)
    give(others, gradients(4)[3])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"fine-tuned weights"):
            base.step()
    projector.detach()


def test_the_projector_state_vouches_for_weights_at_their_snapshot() -> None:
    """It names the anchor."""
    params = parameters(layers())
    base = torch.optim.Adam(params.items(), lr=LR)
    projector = attach(base, config=SPDConfig(weight_decay=LAMBDA, rule="l2sp"))
    base.load_state_dict(_resume(params, torch.optim.Adam(params.items(), lr=0.0)))
    state = projector.state_dict()
    projector.load_state_dict({**state, "num_steps": 3})
    give(params, gradients(4)[3])
    base.step()


@pytest.mark.parametrize("zero", ["learning rate", "gradients"])
def test_a_start_that_moves_nothing_is_no_training(zero: str) -> None:
    """A warm-up from lr 0 makes moments; a checkpoint library's step makes state, but no moments."""
    params = parameters(layers())
    base = torch.optim.Adam(params.items(), lr=LR)
    if zero == "gradients":
        give(params, {name: w * 0 for name, w in layers().items()})
        base.step()
    projector = attach(base, config=SPDConfig(weight_decay=LAMBDA))
    for t, given in enumerate(gradients(3)):
        base.param_groups[0]["lr"] = 0.0 if t == 0 and zero == "learning rate" else LR
        give(params, given)
        base.step()
    assert projector.num_steps == (2 if zero == "learning rate" else 3)


def test_state_that_an_optimizer_begins_with_is_no_training() -> None:
    params = parameters(layers())
    base = torch.optim.Adagrad(params.items(), lr=LR, initial_accumulator_value=0.1)
    projector = attach(base, config=SPDConfig(weight_decay=LAMBDA))
    for given in gradients(2):
        give(params, given)
        base.step()
    assert projector.num_steps == 2


@pytest.mark.parametrize("way", ["AdamSPD", "attach"])
def test_one_layer_without_moments_is_no_fault(way: str) -> None:
    """A checkpoint may lack them; the other layers tell that the run was resumed."""
    start = layers()

    def make(params: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        if way == "AdamSPD":
            return _spd(params.items())
        base = torch.optim.Adam(params.items(), lr=LR)
        attach(base, config=SPDConfig(weight_decay=LAMBDA))
        return base

    params, others = parameters(start), parameters(start)
    saved = _resume(params, make(params))
    del saved["state"][1]
    resumed = make(others)
    with torch.no_grad():
        for name, p in others.items():
            p.copy_(params[name])
    resumed.load_state_dict(saved)
    give(others, gradients(4)[3])
    resumed.step()
