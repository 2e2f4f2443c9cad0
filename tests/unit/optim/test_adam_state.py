"""Saving, loading, schedulers and gradient scalers: AdamSPD is an optimizer like torch's own."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from sharded_spd import AdamSPD
from tests.reference.oracle import Oracle
from tests.support.compare import assert_bits_equal, assert_layers_close
from tests.support.local import LAMBDA, LR, SPD, give, gradients, layers, parameters, values


def _spd(params: Any, **options: Any) -> AdamSPD:
    return AdamSPD(params, **{"lr": LR, "weight_decay": LAMBDA, **options})


@pytest.mark.parametrize("through", ["deepcopy", "torch.save"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resume_is_bit_exact(through: str, dtype: torch.dtype) -> None:
    """A new optimizer at the pre-trained weights, then weights and state loaded: no guard, the same bits."""
    start = layers(dtype=dtype)
    params = parameters(start)
    optimizer = _spd(params.items(), amsgrad=True)
    grads = gradients(10, dtype=dtype)
    for given in grads[:5]:
        give(params, given)
        optimizer.step()
    saved: Any = {
        "optimizer": optimizer.state_dict(),
        "spd": optimizer.projector.state_dict(),
        "weights": values(params),
    }
    if through == "deepcopy":
        saved = copy.deepcopy(saved)
    else:
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
    others = parameters(start)
    second = _spd(others.items(), amsgrad=True)
    with torch.no_grad():
        for name, p in others.items():
            p.copy_(saved["weights"][name])
    second.load_state_dict(state_dict=saved["optimizer"])
    second.projector.load_state_dict(state_dict=saved["spd"])
    pulled = 0
    for given in grads[5:]:
        give(params, given)
        give(others, given)
        optimizer.step()
        second.step()
        pulled += sum(layer["s"] > 0 for layer in second.projector.metrics()["layers"].values())
        assert_bits_equal(values(others), values(params))
    assert pulled >= 1


def test_state_dict_has_the_form_of_torch_adam() -> None:
    """Tools that read Adam's checkpoints read this one: the same keys of state, and Adam's of each group."""
    start = layers()
    ours, theirs = parameters(start), parameters(start)
    optimizer, reference = _spd(ours.items()), torch.optim.Adam(theirs.items(), lr=LR)
    for given in gradients(2):
        give(ours, given)
        give(theirs, given)
        optimizer.step()
        reference.step()
    mine, other = optimizer.state_dict(), reference.state_dict()
    assert set(mine) == set(other)
    assert {k: set(v) for k, v in mine["state"].items()} == {k: set(v) for k, v in other["state"].items()}
    assert set(other["param_groups"][0]) - {"decoupled_weight_decay", "differentiable"} <= set(
        mine["param_groups"][0]
    )
    assert mine["param_groups"][0]["params"] == other["param_groups"][0]["params"]


def test_load_torch_adam_state() -> None:
    """Training that began with torch's Adam goes on with SPD: moments and counts are taken over."""
    start = layers()
    grads = gradients(12)
    params = parameters(start)
    reference = torch.optim.Adam(params.items(), lr=LR)
    for given in grads[:4]:
        give(params, given)
        reference.step()
    middle = values(params)
    optimizer = _spd(params.items())
    state = reference.state_dict()
    for group in state["param_groups"]:
        group["weight_decay"] = LAMBDA
    optimizer.load_state_dict(state)
    oracle = Oracle(start, start, replace(SPD, weight_decay=0.0))
    for given in grads[:4]:
        oracle.step(given)
    oracle.anchors = {name: w.clone() for name, w in middle.items()}
    oracle.weights = {name: w.clone() for name, w in middle.items()}  # d = 0 to the last bit
    oracle.options = SPD
    for given in grads[4:]:
        give(params, given)
        optimizer.step()
        oracle.step(given)
        assert_layers_close(values(params), oracle.weights, relative=1e-10)


def test_state_dict_hooks_run() -> None:
    params = parameters(layers())
    optimizer = _spd(params.items())
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("save"))
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: seen.append("load"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["save", "load"]


def test_load_refuses_another_number_of_parameters() -> None:
    optimizer = _spd(parameters(layers()).items())
    other = _spd(list(parameters(layers()).items())[:2])
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(other.state_dict())


def test_zero_grad_and_repr() -> None:
    params = parameters(layers())
    optimizer = _spd(params.items())
    give(params, gradients(1)[0])
    optimizer.zero_grad()
    assert all(p.grad is None for p in params.values())
    assert "AdamSPD" in repr(optimizer)
    assert f"lr: {LR}" in repr(optimizer)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.8)], milestones=[2]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.8)], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.001, max_lr=0.02, step_size_up=2),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=12),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=8),
}


def _torch_schedulers() -> list[str]:
    found = inspect.getmembers(lr_scheduler, inspect.isclass)
    return [
        name
        for name, cls in found
        if issubclass(cls, lr_scheduler.LRScheduler)
        and cls is not lr_scheduler.LRScheduler
        and name[0] != "_"
    ]


@pytest.mark.parametrize("name", _torch_schedulers())
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_every_scheduler_of_torch(name: str, tensor_lr: bool) -> None:
    """Learning rates and betas go as for torch's Adam, and the step follows them."""
    start = layers()
    params = parameters(start)

    def lr() -> Any:
        return torch.tensor(LR, dtype=torch.float64) if tensor_lr else LR

    reference = torch.optim.Adam(parameters(start).values(), lr=lr())
    optimizer = AdamSPD(params.items(), lr=lr(), weight_decay=LAMBDA)
    ours, theirs = SCHEDULERS[name](optimizer), SCHEDULERS[name](reference)
    oracle, seen = Oracle(start, start, SPD), set()
    for given in gradients(10):
        group = reference.param_groups[0]
        oracle.options = replace(SPD, lr=float(group["lr"]), betas=group["betas"])
        assert float(optimizer.param_groups[0]["lr"]) == float(group["lr"])
        seen.add(float(group["lr"]))
        give(params, given)
        optimizer.step()
        reference.step()
        oracle.step(given)
        assert_layers_close(values(params), oracle.weights, relative=1e-10)
        args = (1.0,) if name == "ReduceLROnPlateau" else ()
        ours.step(*args)
        theirs.step(*args)
    assert len(seen) > 1


def test_scheduler_state_resumes() -> None:
    params = parameters(layers())
    optimizer = _spd(params.items())
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
    for given in gradients(3):
        give(params, given)
        optimizer.step()
        scheduler.step()
    twin = _spd(parameters(layers()).items())
    other = lr_scheduler.CosineAnnealingLR(twin, T_max=8)
    twin.load_state_dict(optimizer.state_dict())
    other.load_state_dict(scheduler.state_dict())
    assert twin.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != LR
    assert other.get_last_lr() == scheduler.get_last_lr()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(fused: bool, unscale: bool) -> None:
    """The scaler divides, or leaves it to a fused optimizer; an overflow changes no weight and no state."""
    start = layers(dtype=torch.float32)
    params = parameters(start)
    optimizer = _spd(params.items(), fused=fused)
    oracle, pulled = Oracle(start, start, SPD), 0
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1000)
    for t, given in enumerate(gradients(10, dtype=torch.float32)):
        overflow = t in (0, 4)
        before = values(params)
        saved = copy.deepcopy(optimizer.state_dict()["state"])
        loss = sum(((params[name] * g).sum() for name, g in given.items()), torch.zeros(()))
        scaler.scale(loss).backward()
        if overflow:
            grad = params["body.weight"].grad
            assert grad is not None
            grad[0, 0] = torch.inf
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if overflow:
            assert_bits_equal(values(params), before)
            for key, state in optimizer.state_dict()["state"].items():
                for name, value in state.items():
                    if key in saved:
                        assert torch.equal(value, saved[key][name]), name
                    else:
                        assert float(value.abs().sum()) == 0.0, name
            continue
        pulled += sum(stats.s > 0 for stats in oracle.step(given).values())
        assert_layers_close(values(params), oracle.weights, relative=2e-6)
    assert pulled >= 2


@pytest.mark.parametrize("anchor", ["zero", "snapshot"])
@pytest.mark.parametrize(("saved_named", "loaded_named"), [(0, 1), (1, 0), (0, 0)])
def test_checkpoints_with_and_without_names_are_compared_by_their_values(
    anchor: str, saved_named: int, loaded_named: int
) -> None:
    start = layers()
    given = gradients(1)[0]
    params = parameters(start)
    first = _spd(params.items() if saved_named else params.values(), anchor=anchor)
    give(params, given)
    first.step()
    others = parameters(start)
    second = _spd(others.items() if loaded_named else others.values(), anchor=anchor)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.no_grad():
        for name, p in others.items():
            p.copy_(params[name])
    for optimizer, own in ((first, params), (second, others)):
        give(own, given)
        optimizer.step()
    assert_bits_equal(values(others), values(params))
    stranger = parameters(layers(seed=4))
    third = _spd(stranger.items() if loaded_named else stranger.values())
    if anchor == "snapshot":
        with pytest.raises(ValueError, match="group 0: another anchor than the checkpoint's"):
            third.load_state_dict(first.state_dict())


@pytest.mark.parametrize(("saved_named", "loaded_named"), [(0, 1), (1, 0)])
def test_rule_state_finds_its_layers_with_and_without_names(saved_named: int, loaded_named: int) -> None:
    start = layers()
    params, others = parameters(start), parameters(start)
    first = _spd(params.items() if saved_named else params.values(), rule="ftp", weight_decay=0.1)
    second = _spd(others.items() if loaded_named else others.values(), rule="ftp", weight_decay=0.1)
    grads = gradients(6)
    for given in grads[:3]:
        give(params, given)
        first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.no_grad():
        for name, p in others.items():
            p.copy_(params[name])
    for given in grads[3:]:
        for optimizer, own in ((first, params), (second, others)):
            give(own, given)
            optimizer.step()
        assert_bits_equal(values(others), values(params))


def test_a_checkpoint_whose_fingerprints_have_no_hash_of_values_loads() -> None:
    """As they were written before."""
    params = parameters(layers())
    optimizer = _spd(params.items())
    saved = copy.deepcopy(optimizer.state_dict())
    (group,) = saved["param_groups"]
    group["anchor_fingerprint"] = group["anchor_fingerprint"].rpartition("/")[0]
    optimizer.load_state_dict(saved)
    group["anchor_fingerprint"] = "0" * 32 + "/4"
    with pytest.raises(ValueError, match="another pre-trained model"):
        optimizer.load_state_dict(saved)


def test_hooks_of_loading_come_first_and_last() -> None:
    """The first may convert any format; the last find the groups as they shall be, and win."""
    params = parameters(layers())
    optimizer = _spd(params.items())
    give(params, gradients(1)[0])
    optimizer.step()
    saved = {"inside": copy.deepcopy(optimizer.state_dict())}
    seen: list[float] = []

    def finish(o: torch.optim.Optimizer) -> None:
        seen.append(o.param_groups[0]["weight_decay"])
        o.param_groups[0]["weight_decay"] = 0.25

    optimizer.register_load_state_dict_pre_hook(lambda _, converted: converted["inside"])
    optimizer.register_load_state_dict_post_hook(finish)
    num_hooks = len(optimizer._optimizer_load_state_dict_pre_hooks)
    optimizer.load_state_dict(saved)
    assert seen == [LAMBDA]
    assert optimizer.param_groups[0]["weight_decay"] == 0.25
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == num_hooks


@pytest.mark.parametrize("fault", ["anchor", "groups", "rule state", "rule's anchor"])
def test_a_checkpoint_that_is_refused_changes_nothing(fault: str) -> None:
    params = parameters(layers())
    optimizer = _spd(params.items(), rule="ftp", weight_decay=0.1)
    for given in gradients(3):
        give(params, given)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    (group,) = saved["param_groups"]
    if fault == "anchor":
        group["anchor_fingerprint"] = "0" * 32 + "/4"
    elif fault == "groups":
        saved["param_groups"] = [group, group]
    elif fault == "rule state":
        state = saved["projector"]["layers"]["norm.weight"]
        state["shard.previous"] = torch.zeros(7)
    else:
        saved["projector"]["fingerprint"] = "0" * 32
    for state in saved["state"].values():
        state["exp_avg"].zero_()
    group["lr"] = 0.5
    saved["projector"]["num_steps"] = 99
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises((ValueError, RuntimeError)):
        optimizer.load_state_dict(saved)
    now = optimizer.state_dict()
    assert now["param_groups"] == before["param_groups"]
    assert now["projector"]["num_steps"] == 3
    for theirs, ours in (
        (before["state"], now["state"]),
        (before["projector"]["layers"], now["projector"]["layers"]),
    ):
        for key, own in theirs.items():
            assert all(torch.equal(torch.as_tensor(ours[key][n]), torch.as_tensor(v)) for n, v in own.items())
