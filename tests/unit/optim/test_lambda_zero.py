"""Lambda 0 in a group: torch's own step to the last bit; nothing is asked of anchors until it is positive."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sharded_spd import AdamSPD, SPDConfig, attach
from tests.support.compare import assert_bits_equal
from tests.support.local import LAMBDA, LR, give, gradients, layers, parameters, values


def _move(params: dict[str, nn.Parameter]) -> None:
    with torch.no_grad():
        for p in params.values():
            p.add_(1.0)


def _held(optimizer: AdamSPD) -> dict[str, bool]:
    held = optimizer.projector.export_anchors()
    return {name: anchor.values is not None for name, anchor in held.items()}


@pytest.mark.parametrize("fused", [None, True, False])
@pytest.mark.parametrize("rule", ["spd", "l2sp", "cwd", "maps"])
def test_a_group_without_strength_is_torch_adam_beside_one_with(rule: str, fused: bool | None) -> None:
    start = layers(dtype=torch.float32)
    ours, theirs = parameters(start), parameters(start)
    (first, *rest) = ours.items()
    groups: Any = [{"params": [first], "weight_decay": LAMBDA}, {"params": rest}]
    optimizer = AdamSPD(groups, lr=LR, rule=rule, fused=fused)
    plain = torch.optim.Adam(list(theirs.values())[1:], lr=LR, fused=fused)
    for given in gradients(6):
        for params, own in ((ours, optimizer), (theirs, plain)):
            give(params, given)
            own.step()
    got, want = values(ours), values(theirs)
    assert_bits_equal({n: got[n] for n in dict(rest)}, {n: want[n] for n in dict(rest)})


@pytest.mark.parametrize("way", ["AdamSPD", "attach"])
def test_weights_may_be_loaded_at_any_time(way: str) -> None:
    params = parameters(layers())
    if way == "attach":
        optimizer: Any = torch.optim.Adam(params.items(), lr=LR)
        projector = attach(optimizer, config=SPDConfig(weight_decay=0.0))
    else:
        optimizer = AdamSPD(params.items(), lr=LR)
        projector = optimizer.projector
    _move(params)
    give(params, gradients(1)[0])
    optimizer.step()
    assert not any(a.values is not None for a in projector.export_anchors().values())


def test_a_checkpoint_of_other_weights_loads_and_is_compared_when_lambda_is_positive() -> None:
    params = parameters(layers())
    optimizer = AdamSPD(params.items(), lr=LR)
    give(params, gradients(1)[0])
    optimizer.step()
    others = parameters(values(params))
    resumed = AdamSPD(others.items(), lr=LR)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.param_groups[0]["weight_decay"] = LAMBDA
    give(others, gradients(2)[1])
    for _ in range(2):
        with pytest.raises(ValueError, match="group 0: another anchor than the checkpoint's"):
            resumed.step()
    resumed.param_groups[0]["weight_decay"] = 0.0
    resumed.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["weight_decay"] = LAMBDA
    with pytest.raises(ValueError, match="group 0: another anchor than the checkpoint's"):
        resumed.load_state_dict(saved)


def test_the_snapshot_is_taken_when_lambda_is_first_positive() -> None:
    """Of weights that have not moved: a step without a learning rate, say."""
    start = layers()
    ours, theirs = parameters(start), parameters(start)
    late = AdamSPD(ours.items(), lr=LR)
    early = AdamSPD(theirs.items(), lr=LR, weight_decay=LAMBDA)
    assert not any(_held(late).values())
    assert all(_held(early).values())
    late.param_groups[0]["weight_decay"] = LAMBDA
    for given in gradients(5):
        for params, optimizer in ((ours, late), (theirs, early)):
            give(params, given)
            optimizer.step()
    assert all(_held(late).values())
    assert_bits_equal(values(ours), values(theirs))


@pytest.mark.parametrize("rebinds", [False, True])
@pytest.mark.parametrize("how", ["trained", "copied"])
def test_weights_that_moved_while_lambda_was_zero_are_no_anchor(how: str, rebinds: bool) -> None:
    params = parameters(layers())
    optimizer = AdamSPD(params.items(), lr=LR)
    for t, given in enumerate(gradients(4)):
        give(params, given)
        if t < 2:
            optimizer.step()
            continue
        if t == 2 and rebinds:
            optimizer.add_param_group({"params": [("new", nn.Parameter(torch.ones(2)))]})
        if t == 2 and how == "copied":
            optimizer = copy.deepcopy(optimizer)
            for p, g in zip(optimizer.param_groups[0]["params"], given.values(), strict=True):
                p.grad = g.clone()
        optimizer.param_groups[0]["weight_decay"] = LAMBDA
        with pytest.raises(ValueError, match=r"moved while lambda was 0.*embed\.weight"):
            optimizer.step()


def test_a_warm_up_of_lambda_works_from_a_file_and_as_a_tensor(tmp_path: Any) -> None:
    start = layers()
    save_file(start, tmp_path / "anchor.safetensors")
    runs = []
    for anchor, zero in ((tmp_path / "anchor.safetensors", 0.0), ("snapshot", torch.zeros(()))):
        params = parameters(start)
        optimizer = AdamSPD(params.items(), lr=LR, anchor=anchor, weight_decay=zero, fused=False)
        for t, given in enumerate(gradients(6)):
            optimizer.param_groups[0]["weight_decay"] = zero if t < 2 else LAMBDA * t / 6
            give(params, given)
            optimizer.step()
        distances = optimizer.projector.deviation()
        assert all(
            distances[name][0] == pytest.approx(float((p.detach() - start[name]).norm()))
            for name, p in params.items()
        )
        runs.append(values(params))
    assert_bits_equal(*runs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_decay_with_the_fused_step_is_torch_fused_adamw(dtype: torch.dtype, amsgrad: bool) -> None:
    """In half precision, too, where a decay of its own would round twice."""
    start = {"w": torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)}
    options: Any = {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": amsgrad, "fused": True}
    ours, theirs = parameters(start), parameters(start)
    backbone = nn.Parameter(torch.ones(3))
    optimizer = AdamSPD(
        [{"params": list(ours.values())}, {"params": [backbone], "rule": "spd"}], rule="decay", **options
    )
    plain = torch.optim.AdamW(theirs.values(), **options)
    for t in range(5):
        grad = {"w": torch.randn(1000, generator=torch.Generator().manual_seed(t))}
        backbone.grad = torch.ones(3)
        for params, own in ((ours, optimizer), (theirs, plain)):
            give(params, grad)
            own.step()
    assert_bits_equal(values(ours), values(theirs))
