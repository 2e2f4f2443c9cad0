"""What `attach` leaves alone, what it warns of, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from sharded_spd import AdamSPD, SPDConfig, attach
from sharded_spd.config import AnchorConfig, LayerConfig, TelemetryConfig
from tests.reference.oracle import BaseOracle, LayerOptions, Oracle
from tests.support.compare import assert_bits_equal, assert_layers_close
from tests.support.local import LAMBDA, LR, SPD, follow, give, gradients, layers, parameters, values
from tests.support.models import Probe

CONFIG = SPDConfig(weight_decay=LAMBDA)


def _adam(model: nn.Module, **options: Any) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), **{"lr": LR, **options})


def test_type_state_and_groups_stay_the_base_own() -> None:
    start = layers()
    model, other = Probe(start), Probe(start)
    optimizer, reference = _adam(model), _adam(other)
    attach(optimizer, model, CONFIG)
    for given in gradients(3):
        give(dict(model.named_parameters()), given)
        give(dict(other.named_parameters()), given)
        optimizer.step()
        reference.step()
    assert type(optimizer) is torch.optim.Adam
    mine, theirs = optimizer.state_dict(), reference.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert {k: set(v) for k, v in mine["state"].items()} == {k: set(v) for k, v in theirs["state"].items()}


def test_base_weight_decay_is_not_lambda_and_warns() -> None:
    """The base's coupled decay goes on as it is; that it decays a pulled layer is said once."""
    start = layers()
    model = Probe(start)
    params = dict(model.named_parameters())

    def make(p: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(p.values(), lr=LR, weight_decay=0.3)

    optimizer = make(params)
    with pytest.warns(UserWarning, match="weight_decay"):
        attach(optimizer, model, CONFIG)
    follow(optimizer, params, BaseOracle(start, start, SPD, make), gradients(10))


def test_base_that_decays_only_unpulled_layers_does_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    model = Probe(layers())
    params = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [params["norm.weight"], params["body.bias"]], "weight_decay": 0.1},
            {"params": [params["embed.weight"], params["body.weight"]], "weight_decay": 0.0},
        ],
        lr=LR,
    )
    none = tuple(LayerConfig(pattern=pattern, rule="none") for pattern in (r"norm\..*", r".*\.bias"))
    attach(optimizer, model, SPDConfig(weight_decay=LAMBDA, layers=none))
    assert not [w for w in recwarn if "weight_decay" in str(w.message)]


def test_lambda_zero_everywhere_warns() -> None:
    model = Probe(layers())
    with pytest.warns(UserWarning, match="plain"):
        attach(_adam(model), model, SPDConfig(weight_decay=0.0))


def test_group_added_after_attach_raises_until_bound() -> None:
    """The message says to call bind(), which leaves alone what is bound."""
    start = layers()
    model = Probe(start)
    params = dict(model.named_parameters())
    first = {n: params[n] for n in list(params)[:2]}
    rest = {n: params[n] for n in list(params)[2:]}
    optimizer = torch.optim.Adam(first.values(), lr=LR)
    projector = attach(optimizer, model, CONFIG)
    grads = gradients(12)
    oracle = Oracle({n: start[n] for n in first}, start, SPD)
    follow(optimizer, first, oracle, [{n: g[n] for n in first} for g in grads[:4]], pulls=False)
    optimizer.add_param_group({"params": list(rest.values())})
    before = values(params)
    give(params, grads[4])
    with pytest.raises(RuntimeError, match=r"bind\(\)"):
        optimizer.step()
    assert_bits_equal(values(params), before)
    projector.bind()
    second = Oracle({n: start[n] for n in rest}, start, SPD)
    for given in grads[4:]:
        give(params, given)
        optimizer.step()
        oracle.step({n: given[n] for n in first})
        second.step({n: given[n] for n in rest})
        assert_layers_close(values(params), {**oracle.weights, **second.weights}, relative=1e-10)


def test_weights_loaded_after_attach_raise() -> None:
    model = Probe(layers())
    optimizer = _adam(model)
    attach(optimizer, model, CONFIG)
    model.load_state_dict(layers(seed=5))
    params = dict(model.named_parameters())
    give(params, gradients(1)[0])
    with pytest.raises(ValueError, match=r"(?s)(?=.*embed\.weight)(?=.*bind\(\))"):
        optimizer.step()


def test_guard_leaves_resumed_training_alone() -> None:
    """Weights and base state loaded after attach are a resumed run, not weights loaded too late."""
    start = layers()
    model = Probe(start)
    optimizer = _adam(model)
    attach(optimizer, model, CONFIG)
    for given in gradients(3):
        give(dict(model.named_parameters()), given)
        optimizer.step()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = Probe(start)
    second = _adam(other)
    attach(second, other, CONFIG)
    other.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    for given in gradients(8)[3:]:
        for m, o in ((model, optimizer), (other, second)):
            give(dict(m.named_parameters()), given)
            o.step()
        assert_bits_equal(other.state_dict(), model.state_dict())


def test_deferred_then_bind() -> None:
    model = Probe(layers())
    optimizer = _adam(model)
    projector = attach(
        optimizer, model, SPDConfig(weight_decay=LAMBDA, anchor=AnchorConfig(source="deferred"))
    )
    params = dict(model.named_parameters())
    give(params, gradients(1)[0])
    with pytest.raises(RuntimeError, match=r"bind\(\)"):
        optimizer.step()
    loaded = layers(seed=5)
    model.load_state_dict(loaded)
    projector.bind(model)
    follow(optimizer, params, Oracle(loaded, loaded, SPD), gradients(8))


def test_meta_model_is_deferred_by_itself() -> None:
    """Frameworks build on meta, fill, and put the new parameters into the groups; then bind(model)."""
    start = layers()
    with torch.device("meta"):
        model = Probe({name: torch.empty_like(w, device="meta") for name, w in start.items()})
    optimizer = _adam(model)
    projector = attach(optimizer, model, CONFIG)
    model.to_empty(device="cpu")
    model.load_state_dict(start)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    projector.bind(model)
    follow(optimizer, dict(model.named_parameters()), Oracle(start, start, SPD), gradients(8))


def test_parameters_swapped_after_attach() -> None:
    start = layers()
    model = Probe(start)
    optimizer = _adam(model)
    projector = attach(optimizer, model, CONFIG)
    other = Probe(start)
    optimizer.param_groups[0]["params"] = list(other.parameters())
    params = dict(other.named_parameters())
    give(params, gradients(1)[0])
    with pytest.raises(RuntimeError, match=r"bind\(\)"):
        optimizer.step()
    projector.bind(other)
    follow(optimizer, params, Oracle(start, start, SPD), gradients(8))


def test_without_a_model() -> None:
    """Names come from the optimizer's own pairs; unnamed parameters do as well, with made-up names."""
    for named in (True, False):
        start = layers()
        params = parameters(start)
        optimizer = torch.optim.Adam(params.items() if named else params.values(), lr=LR)
        projector = attach(optimizer, config=CONFIG)
        follow(optimizer, params, Oracle(start, start, SPD), gradients(8))
        if named:
            assert set(projector.metrics()["layers"]) == set(start)


def test_pattern_without_names_raises() -> None:
    optimizer = torch.optim.Adam(parameters(layers()).values(), lr=LR)
    config = SPDConfig(weight_decay=LAMBDA, layers=(LayerConfig(pattern="body.*", weight_decay=0.0),))
    with pytest.raises((ValueError, RuntimeError), match="name"):
        attach(optimizer, config=config)


def test_pattern_that_matches_nothing_raises() -> None:
    model = Probe(layers())
    config = SPDConfig(layers=(LayerConfig(pattern="haed.*", weight_decay=0.0),))
    with pytest.raises(ValueError, match=r"haed\.\*"):
        attach(_adam(model), model, config)


def test_unknown_rule_raises() -> None:
    model = Probe(layers())
    with pytest.raises(ValueError, match=r"sdp.*spd"):
        attach(_adam(model), model, SPDConfig(rule="sdp"))


def test_patterns_choose_rules_and_anchors() -> None:
    start = layers()
    model = Probe(start)
    params = dict(model.named_parameters())
    config = SPDConfig(
        weight_decay=LAMBDA,
        layers=(
            LayerConfig(pattern=r"body\.bias", rule="decay", weight_decay=0.2),
            LayerConfig(pattern=r"body\..*", rule="l2sp", weight_decay=0.7),
            LayerConfig(
                pattern=r"norm\..*", anchor=AnchorConfig(source="zero"), max_pull=0.1, weight_decay=5.0
            ),
        ),
    )
    options = {
        "embed.weight": SPD,
        "body.weight": LayerOptions(lr=LR, weight_decay=0.7, rule="l2sp"),
        "body.bias": LayerOptions(lr=LR, weight_decay=0.2, rule="decay"),
        "norm.weight": LayerOptions(lr=LR, weight_decay=5.0, max_pull=0.1),
    }
    optimizer = _adam(model)
    attach(optimizer, model, config)
    anchors = {name: w for name, w in start.items() if name != "norm.weight"}
    follow(optimizer, params, Oracle(start, anchors, options), gradients(10))


def test_model_that_the_optimizer_does_not_train_raises() -> None:
    """Parameters that are in no module of the model given."""
    model, other = Probe(layers()), Probe(layers())
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        attach(_adam(model), other, CONFIG)


@pytest.mark.parametrize("target", [None, 3, "adam", []])
def test_other_targets_are_refused(target: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        attach(target, Probe(layers()), CONFIG)


def test_attach_to_adam_spd_raises() -> None:
    """It has a projector of its own."""
    model = Probe(layers())
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        attach(AdamSPD(model.named_parameters(), lr=LR, weight_decay=LAMBDA), model, CONFIG)


def test_telemetry_lines(tmp_path: Any) -> None:
    """Every second step a JSON line."""
    import json

    model = Probe(layers())
    path = tmp_path / "spd.jsonl"
    config = SPDConfig(weight_decay=LAMBDA, telemetry=TelemetryConfig(every=2, path=str(path)))
    optimizer = _adam(model)
    attach(optimizer, model, config)
    for given in gradients(6):
        give(dict(model.named_parameters()), given)
        optimizer.step()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert set(line["layers"]) == set(layers())
        assert 0 <= line["activation_rate"] <= 1
    steps = [line["step"] for line in lines]
    assert steps[1] - steps[0] == steps[2] - steps[1] == 2


def test_state_dict_names_the_anchor() -> None:
    """Another anchor than the checkpoint's is refused."""
    start = layers()
    model = Probe(start)
    saved = attach(_adam(model), model, CONFIG).state_dict()
    same = Probe(start)
    attach(_adam(same), same, CONFIG).load_state_dict(saved)
    other = Probe(layers(seed=5))
    projector = attach(_adam(other), other, CONFIG)
    with pytest.raises(ValueError, match="anchor"):
        projector.load_state_dict(saved)


def test_compiled_and_wrapped_names_are_resolved() -> None:
    """`_orig_mod.` and the like do not reach patterns or metrics."""
    start = layers()

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._orig_mod = Probe(start)

    model = Wrapper()
    optimizer = _adam(model)
    projector = attach(optimizer, model, SPDConfig(layers=(LayerConfig(pattern="body.*", weight_decay=0.0),)))
    give({name.removeprefix("_orig_mod."): p for name, p in model.named_parameters()}, gradients(1)[0])
    optimizer.step()
    assert set(projector.metrics()["layers"]) == set(start)
