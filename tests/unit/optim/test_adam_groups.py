"""Every way to hand parameters to AdamSPD, and what its groups and state hold."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_spd import AdamSPD, SPDConfig, attach
from tests.reference.oracle import LayerOptions, Oracle
from tests.support.compare import assert_bits_equal, assert_layers_close
from tests.support.local import (
    LAMBDA,
    LR,
    SPD,
    follow,
    give,
    gradients,
    layers,
    parameters,
    plain_values,
    values,
)

FORMS = {
    "tensors": lambda params: list(params.values()),
    "generator": lambda params: (p for p in params.values()),
    "pairs": lambda params: list(params.items()),
    "pairs_generator": lambda params: (pair for pair in params.items()),
    "dict": lambda params: [{"params": list(params.values())}],
    "dict_of_pairs": lambda params: [{"params": list(params.items())}],
    "two_dicts": lambda params: [
        {"params": list(params.values())[:2]},
        {"params": list(params.values())[2:], "lr": LR},
    ],
    "one_tensor_each": lambda params: [{"params": p} for p in params.values()],
    "pre_none": lambda params: [{"params": list(params.values()), "pre": None}],
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_parameters(form: str) -> None:
    start = layers()
    params = parameters(start)
    optimizer = AdamSPD(FORMS[form](params), lr=LR, weight_decay=LAMBDA)
    anchors = {} if form == "pre_none" else start
    follow(optimizer, params, Oracle(start, anchors, SPD), gradients(8))


def test_published_call_with_pre() -> None:
    """`{"params": [...], "pre": [...]}`; the list may hold None for single layers."""
    start, anchors = layers(), layers(seed=5)
    params = parameters(start)
    names = list(params)
    pre: list[Tensor | None] = [anchors[name].clone() for name in names]
    pre[1] = None
    optimizer = AdamSPD([{"params": list(params.values()), "pre": pre}], lr=LR, weight_decay=LAMBDA)
    anchors[names[1]] = torch.zeros_like(anchors[names[1]])
    follow(optimizer, params, Oracle(start, anchors, SPD), gradients(8))


def test_pre_is_not_watched() -> None:
    """What the caller does with his tensors later does not move the anchor."""
    start, anchors = layers(), layers(seed=5)
    params = parameters(start)
    pre = [a.clone() for a in anchors.values()]
    optimizer = AdamSPD([{"params": list(params.values()), "pre": pre}], lr=LR, weight_decay=LAMBDA)
    for a in pre:
        a.zero_()
    follow(optimizer, params, Oracle(start, anchors, SPD), gradients(8))


def test_pre_may_be_the_parameters_themselves() -> None:
    """Some pass the live parameters: a snapshot has to be taken."""
    start = layers()
    params = parameters(start)
    optimizer = AdamSPD(
        [{"params": list(params.values()), "pre": list(params.values())}], lr=LR, weight_decay=LAMBDA
    )
    follow(optimizer, params, Oracle(start, start, SPD), gradients(8))


@pytest.mark.parametrize("count", [0, 3, 5])
def test_pre_of_another_length(count: int) -> None:
    params = parameters(layers())
    pre = [torch.zeros(1)] * count
    with pytest.raises(ValueError, match=rf"(?s)(?=.*\b{count}\b)(?=.*\b{len(params)}\b).*pre"):
        AdamSPD([{"params": list(params.values()), "pre": pre}], lr=LR, weight_decay=LAMBDA)


def test_pre_of_another_shape_names_the_layer() -> None:
    params = parameters(layers())
    pre = [torch.zeros_like(p) for p in params.values()]
    pre[1] = torch.zeros(4, 5)
    with pytest.raises(ValueError, match=r"body\.weight"):
        AdamSPD([{"params": list(params.items()), "pre": pre}], lr=LR, weight_decay=LAMBDA)


def test_groups_override() -> None:
    """Learning rate, betas, strength, rule, bound and anchor of a group."""
    start = layers()
    params = parameters(start)
    options = {
        "embed.weight": LayerOptions(lr=0.05, weight_decay=3.0, betas=(0.8, 0.9)),
        "body.weight": LayerOptions(lr=LR, weight_decay=0.5, rule="l2sp"),
        "body.bias": LayerOptions(lr=LR, weight_decay=0.1, rule="decay"),
        "norm.weight": LayerOptions(lr=LR, weight_decay=9.0, max_pull=0.3),
    }
    optimizer = AdamSPD(
        [
            {"params": [params["embed.weight"]], "lr": 0.05, "weight_decay": 3.0, "betas": (0.8, 0.9)},
            {"params": [params["body.weight"]], "weight_decay": 0.5, "rule": "l2sp"},
            {"params": [params["body.bias"]], "weight_decay": 0.1, "rule": "decay"},
            {"params": [params["norm.weight"]], "weight_decay": 9.0, "max_pull": 0.3, "anchor": "zero"},
        ],
        lr=LR,
        weight_decay=LAMBDA,
    )
    anchors = {name: w for name, w in start.items() if name != "norm.weight"}
    follow(optimizer, params, Oracle(start, anchors, options), gradients(10))


def test_group_scalars_may_change_between_steps() -> None:
    start = layers()
    params = parameters(start)
    optimizer = AdamSPD(params.items(), lr=LR, weight_decay=LAMBDA)
    oracle = Oracle(start, start, SPD)
    grads = gradients(12)
    follow(optimizer, params, oracle, grads[:6])
    optimizer.param_groups[0]["weight_decay"] = 0.25
    optimizer.param_groups[0]["lr"] = 0.1
    oracle.options = replace(SPD, weight_decay=0.25, lr=0.1)
    follow(optimizer, params, oracle, grads[6:], pulls=False)


@pytest.mark.parametrize("named", [False, True])
def test_add_param_group_binds_at_once(named: bool) -> None:
    """Its anchor is where the weights are when it is added."""
    start = layers()
    params = parameters(start)
    names = list(params)

    def some(chosen: list[str]) -> list[Any]:
        return [(n, params[n]) if named else params[n] for n in chosen]

    optimizer = AdamSPD(some(names[:2]), lr=LR, weight_decay=LAMBDA)
    grads = gradients(10)
    first = {name: start[name] for name in names[:2]}
    oracle = Oracle(first, first, SPD)
    follow(
        optimizer,
        {name: params[name] for name in names[:2]},
        oracle,
        [{name: g[name] for name in names[:2]} for g in grads[:4]],
        pulls=False,
    )
    optimizer.add_param_group({"params": some(names[2:]), "weight_decay": 3.0})
    rest = {name: start[name] for name in names[2:]}
    second = Oracle(rest, rest, LayerOptions(lr=LR, weight_decay=3.0))
    for given in grads[4:]:
        give(params, given)
        optimizer.step()
        oracle.step({name: given[name] for name in names[:2]})
        second.step({name: given[name] for name in names[2:]})
        assert_layers_close(values(params), {**oracle.weights, **second.weights}, relative=1e-10)


def test_add_param_group_of_fresh_weights_after_steps() -> None:
    """A new head added later is not taken for weights that were loaded too late."""
    start = layers()
    params = parameters(start)
    optimizer = AdamSPD(params.items(), lr=LR, weight_decay=LAMBDA)
    give(params, gradients(1)[0])
    optimizer.step()
    head = nn.Parameter(torch.randn(2, 2).double())
    optimizer.add_param_group({"params": [("head", head)], "anchor": "zero"})
    before = head.detach().clone()
    head.grad = torch.ones_like(head)
    give(params, gradients(2)[1])
    optimizer.step()
    assert not torch.equal(head.detach(), before)


def test_duplicates_raise_as_torch_does() -> None:
    p = nn.Parameter(torch.randn(3))
    optimizer = AdamSPD([p], lr=LR, weight_decay=LAMBDA)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [p]})


def test_empty_list_raises_as_torch_does() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamSPD([], lr=LR)


def test_non_tensor_raises_as_torch_does() -> None:
    with pytest.raises(TypeError):
        AdamSPD([1.0], lr=LR)  # type: ignore[list-item]


BAD: list[dict[str, Any]] = [
    {"lr": -1.0},
    {"lr": math.nan},
    {"betas": (1.0, 0.9)},
    {"betas": (0.9, 1.0)},
    {"betas": (-0.1, 0.9)},
    {"eps": -1e-8},
    {"weight_decay": -0.1},
    {"weight_decay": math.nan},
    {"weight_decay": math.inf},
    {"max_pull": -1.0},
    {"max_pull": math.nan},
    {"rule": "sdp"},
    {"rule": 3},
    {"anchor": 3},
    {"anchor": "/no/such/file.safetensors"},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_values_raise(bad: dict[str, Any]) -> None:
    """With the value in the message; a group's as the constructor's."""
    params = parameters(layers())
    ((key, value),) = bad.items()
    shown = str(value[0] if isinstance(value, tuple) and not 0 <= value[0] < 1 else value)
    shown = str(value[1]) if key == "betas" and 0 <= value[0] < 1 else shown
    with pytest.raises((ValueError, TypeError), match=shown.replace("(", r"\(").replace(")", r"\)")):
        AdamSPD(params.items(), **{"lr": LR, "weight_decay": LAMBDA, **bad})


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_group_values_raise(bad: dict[str, Any]) -> None:
    """A group's as the constructor's; a group that is refused is not there."""
    params = parameters(layers())
    with pytest.raises((ValueError, TypeError)):
        AdamSPD([{"params": list(params.items()), **bad}], lr=LR, weight_decay=LAMBDA)
    optimizer = AdamSPD(list(params.items())[:1], lr=LR, weight_decay=LAMBDA)
    with pytest.raises((ValueError, TypeError)):
        optimizer.add_param_group({"params": list(params.items())[1:], **bad})
    assert len(optimizer.param_groups) == 1
    give(params, gradients(1)[0])
    optimizer.step()


def test_betas_may_not_be_anything() -> None:
    with pytest.raises((ValueError, TypeError)):
        AdamSPD(parameters(layers()).items(), betas=0.9)  # type: ignore[arg-type]


def test_unnamed_parameters_with_a_path_raise(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    start = layers()
    save_file(start, tmp_path / "anchor.safetensors")
    with pytest.raises((ValueError, RuntimeError), match="name"):
        AdamSPD(
            parameters(start).values(),
            lr=LR,
            weight_decay=LAMBDA,
            anchor=str(tmp_path / "anchor.safetensors"),
        )


def test_model_gives_the_names(tmp_path: Any) -> None:
    """`model=` names parameters that come without."""
    from safetensors.torch import save_file

    from tests.support.models import Probe

    start, anchors = layers(), layers(seed=5)
    save_file(anchors, tmp_path / "anchor.safetensors")
    model = Probe(start)
    params = dict(model.named_parameters())
    optimizer = AdamSPD(
        model.parameters(),
        lr=LR,
        weight_decay=LAMBDA,
        anchor=str(tmp_path / "anchor.safetensors"),
        model=model,
    )
    follow(optimizer, params, Oracle(start, anchors, SPD), gradients(8))


def test_groups_hold_plain_values_only() -> None:
    """Groups are saved: numbers, strings, None and 0-d tensors, never an anchor, a store or a rule."""
    start = layers()
    params = parameters(start)
    pre = [a.clone() for a in layers(seed=5).values()]
    optimizer = AdamSPD(
        [{"params": list(params.items()), "pre": pre}], lr=torch.tensor(LR), weight_decay=LAMBDA
    )
    give(params, gradients(1)[0])
    optimizer.step()
    for group in (*optimizer.param_groups, optimizer.defaults):
        for key, value in plain_values(group).items():
            flat = value if isinstance(value, tuple) else (value,)
            for item in flat:
                assert item is None or isinstance(item, (bool, int, float, str, Tensor)), key
                assert not isinstance(item, Tensor) or item.ndim == 0, key


def test_anchor_is_in_neither_state_nor_groups() -> None:
    """The state is Adam's own, with the same keys for every parameter."""
    start = layers()
    params = parameters(start)
    optimizer = AdamSPD(params.items(), lr=LR, weight_decay=LAMBDA)
    grads = gradients(4)
    for given in grads:
        given.pop("norm.weight", None)
        give(params, given)
        optimizer.step()
    reference = torch.optim.Adam(parameters(start).values(), lr=LR)
    for p, name in zip(reference.param_groups[0]["params"], start, strict=True):
        p.grad = grads[0].get(name)
    reference.step()
    keys = set(next(iter(reference.state.values())))
    assert optimizer.state
    for state in optimizer.state.values():
        assert set(state) == keys
    anchors = list(start.values())
    for state in optimizer.state.values():
        for value in state.values():
            assert not any(
                isinstance(value, Tensor) and value.shape == a.shape and torch.equal(value, a)
                for a in anchors
            )


def test_unpulled_step_leaves_the_bits_alone() -> None:
    """s = 0 is not a lerp by zero: a zero-gradient, zero-lr step changes no bit, nor a sign of zero."""
    start = layers(dtype=torch.float32)
    start["body.bias"][0] = -0.0
    start["body.bias"][1] = torch.inf
    params = parameters(start)
    optimizer = AdamSPD(params.items(), lr=0.0, weight_decay=LAMBDA)
    give(params, {name: torch.zeros_like(w) for name, w in start.items()})
    for _ in range(3):
        optimizer.step()
    for name, p in params.items():
        assert torch.equal(p.detach().view(torch.int32), start[name].view(torch.int32)), name


def test_lr_zero_in_the_middle_pulls_nothing() -> None:
    """Also for a rule whose pull does not see the learning rate: w stays where it was."""
    start = layers()
    params = parameters(start)
    optimizer = AdamSPD(params.items(), lr=LR, weight_decay=LAMBDA)
    for given in gradients(4):
        give(params, given)
        optimizer.step()
    before = values(params)
    optimizer.param_groups[0]["lr"] = 0.0
    for given in gradients(6)[4:]:
        give(params, given)
        optimizer.step()
    assert_bits_equal(values(params), before)


def test_lambda_zero_everywhere_warns_once(recwarn: pytest.WarningsRecorder) -> None:
    params = parameters(layers())
    optimizer = AdamSPD(params.items(), lr=LR)
    for given in gradients(3):
        give(params, given)
        optimizer.step()
    assert sum("plain Adam" in str(w.message) for w in recwarn) == 1


def test_lambda_somewhere_does_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    params = parameters(layers())
    names = list(params)
    AdamSPD(
        [
            {"params": [params[n] for n in names[:2]]},
            {"params": [params[n] for n in names[2:]], "weight_decay": 1.0},
        ],
        lr=LR,
    )
    assert not [w for w in recwarn if "plain Adam" in str(w.message)]


@pytest.mark.parametrize("rule", ["ftp", "digrap"])
@pytest.mark.parametrize("fault", ["anchor", "file"])
def test_a_group_that_cannot_be_added_leaves_everything_as_it_was(
    rule: str, fault: str, tmp_path: Any
) -> None:
    """Bits, rule state, binding: training goes on as if nobody had asked."""
    start = layers()
    stranger = nn.Parameter(torch.randn(3))
    bad = {
        "anchor": {"params": [("stranger", stranger)], "pre": [torch.zeros(4)]},
        "file": {"params": [("stranger", stranger)], "anchor": str(tmp_path / "none.safetensors")},
    }[fault]
    runs = []
    for asks in (False, True):
        params = parameters(start)
        optimizer = AdamSPD(params.items(), lr=LR, weight_decay=0.1, rule=rule)
        for t, given in enumerate(gradients(6)):
            if asks and t in (0, 3):
                before = optimizer.projector.state_dict()
                with pytest.raises(ValueError, match=r"stranger|none"):
                    optimizer.add_param_group(dict(bad))
                after = optimizer.projector.state_dict()
                assert after["fingerprint"] == before["fingerprint"]
                assert after["num_steps"] == t
                assert set(optimizer.projector.deviation()) == set(start)
            give(params, given)
            optimizer.step()
        runs.append((values(params), optimizer.projector.state_dict()["layers"]))
    (weights, state), (others, other_state) = runs
    assert all(torch.equal(w, others[name]) for name, w in weights.items())
    for name, own in state.items():
        assert all(torch.equal(value, other_state[name][key]) for key, value in own.items())


def test_a_binding_that_fails_leaves_the_one_before() -> None:
    """Under attach, too: the group is taken out again, and training goes on."""
    runs = []
    for asks in (False, True):
        params = parameters(layers())
        base = torch.optim.SGD(list(params.values()), lr=LR)
        projector = attach(base, config=SPDConfig(rule="ftp"))
        for t, given in enumerate(gradients(6)):
            if asks and t == 3:
                base.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]})
                with pytest.raises(TypeError, match="complex"):
                    projector.bind()
                with pytest.raises(TypeError, match="complex"):
                    base.step()
                base.param_groups.pop()
            give(params, given)
            base.step()
        runs.append(values(params))
    assert all(torch.equal(w, runs[1][name]) for name, w in runs[0].items())


def test_a_first_binding_that_is_refused_may_be_tried_again() -> None:
    params = parameters(layers())
    saved = AdamSPD(params.items(), lr=LR, weight_decay=LAMBDA).state_dict()
    others = parameters(layers(seed=5))
    optimizer = AdamSPD(others.items(), lr=LR, weight_decay=LAMBDA, anchor="deferred")
    optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="another anchor than the checkpoint's"):
        optimizer.bind()
    assert not optimizer.projector.bound
    with torch.no_grad():
        for name, p in others.items():
            p.copy_(params[name])
    optimizer.bind()
    assert optimizer.projector.bound
