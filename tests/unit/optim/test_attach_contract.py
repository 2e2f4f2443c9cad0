"""attach keeps torch's contract: nested and compiled steps, copies, parameters of other numbers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from sharded_spd import AdamSPD, SPDConfig, attach
from tests.support.compare import assert_bits_equal
from tests.support.local import LAMBDA, LR, give, gradients, layers, parameters, values


class _Nested(Adam):
    """Its step calls the one of its base class, whose hooks torch runs, too."""

    fails = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        if self.fails:
            self.fails -= 1
            raise RuntimeError("after the inner step")
        return result


class _Careless(Adam):
    """It survives an inner step that fails."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        betas, self.param_groups[0]["betas"] = self.param_groups[0]["betas"], None
        try:
            super().step()
        except TypeError:
            self.param_groups[0]["betas"] = betas
        return super().step(closure)


def _attached(kind: type[Adam], **config: Any) -> tuple[dict[str, nn.Parameter], Any, Any]:
    params = parameters(layers())
    base = kind(params.items(), lr=LR)
    return params, base, attach(base, config=SPDConfig(weight_decay=LAMBDA, **config))


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("kind", [_Nested, _Careless])
def test_only_the_outermost_step_is_projected(kind: type[Adam], with_closure: bool) -> None:
    Adam([nn.Parameter(torch.zeros(1))])  # from now on Adam's own step has hooks
    ours, nested, projector = _attached(kind)
    theirs, plain, _ = _attached(Adam)
    for given in gradients(4):
        give(theirs, given)
        plain.step()
        give(ours, given)
        nested.step((lambda: torch.zeros(())) if with_closure else None)
    assert_bits_equal(values(ours), values(theirs))
    assert projector.num_steps == 4


def test_a_nested_step_that_fails_is_no_step_under_way() -> None:
    Adam([nn.Parameter(torch.zeros(1))])
    params, nested, projector = _attached(_Nested)
    nested.fails = 1
    for t, given in enumerate(gradients(3)):
        give(params, given)
        if t == 0:
            with pytest.raises(RuntimeError, match="after the inner step"):
                nested.step()
        else:
            nested.step()
    assert projector.num_steps == 2


def test_a_subclass_of_adam_spd_may_call_its_step() -> None:
    class Sub(AdamSPD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    ours, theirs = parameters(layers()), parameters(layers())
    optimizers = [kind(p.items(), lr=LR, weight_decay=LAMBDA) for kind, p in ((Sub, ours), (AdamSPD, theirs))]
    for given in gradients(3):
        for optimizer, params in zip(optimizers, (ours, theirs), strict=True):
            give(params, given)
            optimizer.step()
    assert_bits_equal(values(ours), values(theirs))


@pytest.mark.parametrize("kind", [SGD, AdamSPD])
def test_a_compiled_step_projects(kind: type[torch.optim.Optimizer]) -> None:
    torch._dynamo.reset()
    runs = []
    for wrap in (lambda step: step, lambda step: torch.compile(step, backend="eager")):
        params = parameters(layers())
        extra: Any = {"weight_decay": LAMBDA} if kind is AdamSPD else {}
        base: Any = kind(params.items(), lr=LR, **extra)
        projector = base.projector if isinstance(base, AdamSPD) else attach(base, config=SPDConfig())
        step = wrap(base.step)
        for given in gradients(3):
            give(params, given)
            step()
        assert projector.num_steps == 3
        runs.append(values(params))
    for name, w in runs[0].items():
        torch.testing.assert_close(runs[1][name], w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_an_attached_optimizer_warns_that_it_is_plain(through: Callable[[Any], Any]) -> None:
    _, base, projector = _attached(Adam)
    for other in (through(base), through(through(base))):
        (group,) = other.param_groups
        for p in group["params"]:
            p.grad = torch.ones_like(p)
        with pytest.warns(UserWarning, match="copy of one that a projector is attached to"):
            other.step()
        other.step()  # once
    assert projector.num_steps == 0
    assert type(through(base)) is Adam


def test_a_copy_that_is_attached_to_and_one_of_a_detached_do_not_warn(
    recwarn: pytest.WarningsRecorder,
) -> None:
    params, base, projector = _attached(Adam)
    give(params, gradients(1)[0])
    other = copy.deepcopy(base)
    attach(other, config=SPDConfig(weight_decay=LAMBDA))
    projector.detach()
    for optimizer in (other, copy.deepcopy(base)):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert "__reduce_ex__" not in vars(base)
    assert not [w for w in recwarn if "copy" in str(w.message)]


_UNREAL = [torch.uint8, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize("way", ["AdamSPD", "pre", "attach"])
@pytest.mark.parametrize("dtype", _UNREAL, ids=str)
def test_frozen_parameters_of_other_numbers_are_left_alone(dtype: torch.dtype, way: str) -> None:
    """As quantised weights are."""
    start = layers()
    params: dict[str, Any] = parameters(start)
    codes = nn.Parameter(torch.ones(6).to(dtype), requires_grad=False)
    both = {"codes": codes, **params}
    if way == "attach":
        optimizer: Any = SGD(both.items(), lr=LR)
        projector = attach(optimizer, config=SPDConfig(weight_decay=LAMBDA))
    else:
        pre = {"pre": [None, *start.values()]} if way == "pre" else {}
        optimizer = AdamSPD([{"params": list(both.items()), **pre}], lr=LR, weight_decay=LAMBDA)
        projector = optimizer.projector
    pulled = 0.0
    for given in gradients(4):
        give(params, given)
        optimizer.step()
        pulled += projector.metrics()["activation_rate"]
    assert set(projector.fingerprints) == set(start)
    assert pulled > 0
    assert torch.equal(codes.detach(), torch.ones(6).to(dtype))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if dtype.is_complex:
        codes.requires_grad_(True)
        codes.grad = torch.ones_like(codes)
        with pytest.raises(TypeError, match=r"codes.*dtype torch\.complex64"):
            optimizer.step()


def test_other_numbers_that_are_to_be_trained_are_refused_by_name() -> None:
    params = {"waves": nn.Parameter(torch.ones(3, dtype=torch.complex64))}
    with pytest.raises(TypeError, match=r"waves.*complex64.*float32"):
        attach(SGD(params.items(), lr=LR))
