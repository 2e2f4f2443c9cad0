"""When the anchor is taken, and what is refused because it would silently be another method."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sharded_spd import AdamSPD
from tests.reference.oracle import LayerOptions, Oracle
from tests.support.compare import assert_bits_equal, assert_layers_close
from tests.support.local import LAMBDA, LR, SPD, follow, give, gradients, layers, parameters, values


def _spd(params: Any, **options: Any) -> AdamSPD:
    return AdamSPD(params, **{"lr": LR, "weight_decay": LAMBDA, **options})


def test_zero_anchor() -> None:
    start = layers()
    params = parameters(start)
    follow(_spd(params.items(), anchor="zero"), params, Oracle(start, {}, SPD), gradients(8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_file_anchor(dtype: torch.dtype, tmp_path: Any) -> None:
    start, anchors = layers(), layers(dtype=dtype, seed=5)
    save_file(anchors, tmp_path / "model.safetensors")
    for source in (tmp_path / "model.safetensors", str(tmp_path)):
        params = parameters(start)
        follow(_spd(params.items(), anchor=source), params, Oracle(start, anchors, SPD), gradients(8))


def test_deferred_then_bound() -> None:
    start, loaded = layers(), layers(seed=5)
    params = parameters(start)
    optimizer = _spd(params.items(), anchor="deferred")
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(loaded[name])
    optimizer.bind()
    follow(optimizer, params, Oracle(loaded, loaded, SPD), gradients(8))


def test_unbound_step_raises_and_changes_nothing() -> None:
    params = parameters(layers())
    optimizer = _spd(params.items(), anchor="deferred")
    before = values(params)
    give(params, gradients(1)[0])
    with pytest.raises(RuntimeError, match=r"bind\(\)"):
        optimizer.step()
    assert_bits_equal(values(params), before)


@pytest.mark.parametrize("grads", ["absent", "zero"])
def test_unbound_step_without_gradients_passes(grads: str) -> None:
    """Engines and checkpoint libraries run such a step to make the state exist."""
    params = parameters(layers())
    optimizer = _spd(params.items(), anchor="deferred")
    before = values(params)
    if grads == "zero":
        for p in params.values():
            p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_bits_equal(values(params), before)
    optimizer.bind()
    give(params, gradients(1)[0])
    optimizer.step()


def test_nan_gradient_is_not_taken_for_none() -> None:
    """An unbound step with NaN gradients is a real step."""
    params = parameters(layers())
    optimizer = _spd(params.items(), anchor="deferred")
    give(params, {name: torch.full_like(p, torch.nan) for name, p in params.items()})
    with pytest.raises(RuntimeError, match=r"bind\(\)"):
        optimizer.step()


def test_weights_loaded_after_the_snapshot_raise() -> None:
    """The message names a layer and says what to do."""
    start, loaded = layers(), layers(seed=5)
    params = parameters(start)
    optimizer = _spd(params.items())
    with torch.no_grad():
        params["body.weight"].copy_(loaded["body.weight"])
    give(params, gradients(1)[0])
    with pytest.raises(ValueError, match=r"(?s)(?=.*body\.weight)(?=.*bind\(\))"):
        optimizer.step()


def test_bind_after_loading_takes_the_loaded_weights() -> None:
    start, loaded = layers(), layers(seed=5)
    params = parameters(start)
    optimizer = _spd(params.items(), anchor="deferred")
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(loaded[name])
    optimizer.bind()
    optimizer.bind()
    follow(optimizer, params, Oracle(loaded, loaded, SPD), gradients(6))


def test_guard_ignores_a_zero_gradient_step() -> None:
    """Checkpoint libraries step with zero gradients at lr 0 before they load weights and state."""
    start = layers()
    params = parameters(start)
    optimizer = _spd(params.items(), lr=0.0)
    give(params, {name: torch.zeros_like(w) for name, w in start.items()})
    optimizer.step()
    assert_bits_equal(values(params), start)


def test_swapped_parameters_raise() -> None:
    """Frameworks replace the objects in a group; the new ones were never bound."""
    params = parameters(layers())
    optimizer = _spd(params.items())
    others = parameters(layers())
    optimizer.param_groups[0]["params"] = list(others.values())
    before = values(others)
    give(others, gradients(1)[0])
    with pytest.raises(RuntimeError, match=r"bind\(\)"):
        optimizer.step()
    assert_bits_equal(values(others), before)


def test_swapped_parameters_can_be_bound_again() -> None:
    """What is known by name keeps its anchor: binding again never takes a new snapshot of it."""
    start = layers()
    params = parameters(start)
    optimizer = _spd(params.items())
    oracle = Oracle(start, start, SPD)
    grads = gradients(10)
    follow(optimizer, params, oracle, grads[:5], pulls=False)
    others = parameters(values(params))
    for old, new in zip(params.values(), others.values(), strict=True):
        optimizer.state[new] = optimizer.state.pop(old)
    optimizer.param_groups[0]["params"] = list(others.values())
    optimizer.bind()
    follow(optimizer, others, oracle, grads[5:], pulls=False)


def test_frozen_layer_thaws_at_its_first_gradient() -> None:
    start = layers()
    params = parameters(start)
    params["body.weight"].requires_grad_(False)
    optimizer = _spd(params.items())
    oracle = Oracle(start, start, SPD)
    grads = gradients(12)
    for given in grads[:4]:
        del given["body.weight"]
    follow(optimizer, params, oracle, grads[:4], pulls=False)
    params["body.weight"].requires_grad_(True)
    follow(optimizer, params, oracle, grads[4:])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_gradient_pulls_nothing_and_spares_the_others(bad: float) -> None:
    """Adam itself spoils that layer; the others go on as if nothing were, and telemetry says so."""
    start = layers()
    params = parameters(start)
    optimizer = _spd(params.items())
    oracle = Oracle(start, start, SPD)
    others = [name for name in start if name != "body.weight"]
    for t, given in enumerate(gradients(8)):
        if t >= 3:
            given["body.weight"][0, 0] = bad
        give(params, given)
        optimizer.step()
        oracle.step({name: given[name] for name in others})
        got = values(params)
        assert_layers_close(
            {n: got[n] for n in others}, {n: oracle.weights[n] for n in others}, relative=1e-10
        )
        metrics = optimizer.projector.metrics()
        assert metrics["nonfinite_layers"] == (["body.weight"] if t >= 3 else [])
        if t >= 3:
            assert metrics["layers"]["body.weight"]["s"] == 0


def test_meta_parameters_are_deferred_by_themselves() -> None:
    """Built on the meta device, filled, bound: the objects may be new ones."""
    start = layers()
    meta = {name: nn.Parameter(w.to("meta")) for name, w in start.items()}
    optimizer = _spd(meta.items())
    params = parameters(start)
    optimizer.param_groups[0]["params"] = list(params.values())
    optimizer.bind()
    follow(optimizer, params, Oracle(start, start, SPD), gradients(6))


def test_metrics_of_a_step() -> None:
    """The figures of the last step, as plain numbers."""
    start = layers()
    params = parameters(start)
    optimizer = AdamSPD(params.items(), lr=LR, weight_decay=20.0)
    oracle = Oracle(start, start, LayerOptions(lr=LR, weight_decay=20.0))
    above = 0
    for t, given in enumerate(gradients(6)):
        give(params, given)
        optimizer.step()
        stats = oracle.step(given)
        metrics = optimizer.projector.metrics()
        assert metrics["step"] in (t, t + 1)
        assert metrics["num_layers"] == 4
        assert metrics["activation_rate"] == pytest.approx(sum(s.s > 0 for s in stats.values()) / 4)
        now = sum(s.s > 1 for s in stats.values())
        above += now
        assert metrics["pulls_above_one"] in (now, above)
        for name, want in stats.items():
            got = metrics["layers"][name]
            assert got["s"] == pytest.approx(want.s, rel=1e-9, abs=1e-12)
            assert got["c"] == pytest.approx(want.c, rel=1e-9, abs=1e-12)
            away = float((oracle.weights[name] - start[name]).norm())
            assert got["deviation"] == pytest.approx(away, rel=1e-9)
            assert got["deviation_rel"] == pytest.approx(away / float(start[name].norm()), rel=1e-9)
            assert all(type(value) in (int, float) for value in got.values())
    assert above >= 1


def test_pull_above_one_warns_once(recwarn: pytest.WarningsRecorder) -> None:
    start = layers()
    params = parameters(start)
    optimizer = AdamSPD(params.items(), lr=LR, weight_decay=50.0)
    for given in gradients(8):
        give(params, given)
        optimizer.step()
        optimizer.projector.metrics()
    assert sum("max_pull" in str(w.message) for w in recwarn) == 1


def _stack(depth: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(3, 3) for _ in range(depth)))


def test_checkpoint_of_a_deeper_model_raises(tmp_path: Any) -> None:
    """Also where the optimizer holds only some layers; it takes the model to tell."""
    deep, model = _stack(4), _stack(2)
    save_file(deep.state_dict(), tmp_path / "deep.safetensors")
    last = list(model[1].named_parameters(prefix="1"))
    with pytest.raises(ValueError, match=r"larger model's|2\.weight"):
        AdamSPD(last, anchor=tmp_path / "deep.safetensors", weight_decay=LAMBDA, model=model)


def test_checkpoint_with_a_head_that_the_model_lacks_is_fine(tmp_path: Any) -> None:
    model = _stack(2)
    extra = {"lm_head.weight": torch.zeros(2, 3), "position_ids": torch.arange(3)}
    save_file({**model.state_dict(), **extra}, tmp_path / "model.safetensors")
    last = list(model[1].named_parameters(prefix="1"))
    optimizer = AdamSPD(last, anchor=tmp_path / "model.safetensors", weight_decay=LAMBDA, model=model)
    assert optimizer.projector.bound
