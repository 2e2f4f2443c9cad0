"""What torch asks of its own optimizers, asked of AdamSPD and of what `attach` leaves of a base.

The inputs are those that torch's suite goes through; its tables are not imported, since they need test
packages of torch's own.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from sharded_spd import AdamSPD, SPDConfig, attach
from tests.support.local import LAMBDA

pytestmark = pytest.mark.filterwarnings("ignore:weight_decay .lambda. is 0:UserWarning")

ADAM: dict[str, dict[str, Any]] = {
    "default": {},
    "lr": {"lr": 0.01},
    "tensor lr": {"lr": torch.tensor(0.001)},
    "tensor lr, fused": {"lr": torch.tensor(0.001), "fused": True},
    "betas": {"betas": (0.8, 0.95)},
    "eps": {"eps": 1e-3},
    "amsgrad": {"amsgrad": True},
    "amsgrad, fused": {"amsgrad": True, "fused": True},
    "amsgrad, foreach": {"amsgrad": True, "foreach": True},
    "maximize": {"maximize": True},
    "maximize, fused": {"maximize": True, "fused": True},
    "foreach": {"foreach": True},
    "loop": {"foreach": False},
    "fused": {"fused": True},
}
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "Adadelta": (optim.Adadelta, {"rho": 0.95}),
    "Adafactor": (optim.Adafactor, {"lr": 0.01}),
    "Adagrad": (optim.Adagrad, {"initial_accumulator_value": 0.1}),
    "Adam": (optim.Adam, {"amsgrad": True}),
    "Adamax": (optim.Adamax, {}),
    "AdamW": (optim.AdamW, {"weight_decay": 0.1}),
    "ASGD": (optim.ASGD, {"t0": 2}),
    "NAdam": (optim.NAdam, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    "RAdam": (optim.RAdam, {}),
    "RMSprop": (optim.RMSprop, {"centered": True, "momentum": 0.1}),
    "Rprop": (optim.Rprop, {}),
    "SGD": (optim.SGD, {"momentum": 0.9, "nesterov": True, "lr": 0.01}),
}
HELD: list[Any] = []
"""Projectors, which nothing else would keep."""

Make = Callable[[Any], Any]


def _attached(base: Any, strength: float = 0.0) -> Any:
    HELD.append(attach(base, config=SPDConfig(weight_decay=strength)))
    return base


PAIRS: dict[str, tuple[Make, Make]] = {
    **{
        f"AdamSPD {name}": (lambda p, k=k: AdamSPD(p, **k), lambda p, k=k: optim.Adam(p, **k))
        for name, k in ADAM.items()
    },
    "AdamSPD none": (lambda p: AdamSPD(p, rule="none"), lambda p: optim.Adam(p)),
    "AdamSPD decay": (
        lambda p: AdamSPD(p, rule="decay", weight_decay=0.1),
        lambda p: optim.AdamW(p, weight_decay=0.1),
    ),
    **{
        f"attach {name}": (lambda p, c=c, k=k: _attached(c(p, **k)), lambda p, c=c, k=k: c(p, **k))
        for name, (c, k) in BASES.items()
    },
}
SOME = ["AdamSPD default", "AdamSPD decay", "attach SGD", "attach Adam"]
PULLED: dict[str, Make] = {
    "AdamSPD": lambda p: AdamSPD(p, weight_decay=LAMBDA, lr=0.01),
    "AdamSPD fused": lambda p: AdamSPD(p, weight_decay=LAMBDA, lr=0.01, fused=True, amsgrad=True),
    "AdamSPD ftp": lambda p: AdamSPD(p, weight_decay=0.1, lr=0.01, rule="ftp"),
}


@pytest.fixture(autouse=True)
def _let_go() -> Iterator[None]:
    yield
    HELD.clear()


def _params(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4, 3), (3,), (2, 2, 2), (1,))
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def _give(params: list[nn.Parameter], t: int) -> None:
    """Each third step the second parameter has no gradient."""
    generator = torch.Generator().manual_seed(100 + t)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = None if i == 1 and t % 3 == 0 else grad


def _run(optimizer: Any, params: list[nn.Parameter], begin: int, end: int) -> None:
    for t in range(begin, end):
        _give(params, t)
        optimizer.step()


def _assert_alike(got: Any, want: Any) -> None:
    """Nested state, to the last bit."""
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for key, value in want.items():
            _assert_alike(got[key], value)
    elif isinstance(want, Tensor):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want)
        for mine, theirs in zip(got, want, strict=True):
            _assert_alike(mine, theirs)
    else:
        assert got == want


@pytest.mark.parametrize("pair", PAIRS)
def test_weights_and_state_are_torch_own(pair: str) -> None:
    runs = []
    for make in PAIRS[pair]:
        params = _params()
        optimizer = make(params)
        _run(optimizer, params, 0, 5)
        runs.append((params, optimizer.state_dict()["state"]))
    (ours, state), (theirs, want) = runs
    _assert_alike([p.detach() for p in ours], [p.detach() for p in theirs])
    _assert_alike(state, want)


@pytest.mark.parametrize("through", ["deepcopy", "torch.save"])
@pytest.mark.parametrize("pair", [*SOME, *PULLED])
def test_state_goes_round(pair: str, through: str) -> None:
    """Into an optimizer that was made at the beginning, as a program that is started again makes it."""
    make = PULLED[pair] if pair in PULLED else PAIRS[pair][0]
    params, others = _params(), _params()
    optimizer, second = make(params), make(others)
    _run(optimizer, params, 0, 4)
    saved = optimizer.state_dict()
    if through == "deepcopy":
        saved = copy.deepcopy(saved)
    else:
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    second.load_state_dict(saved)
    for own, mine in ((optimizer, params), (second, others)):
        _run(own, mine, 4, 7)
    _assert_alike([p.detach() for p in others], [p.detach() for p in params])
    _assert_alike(second.state_dict()["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("pair", PULLED)
def test_copies_go_on_as_the_original_does(pair: str, through: Callable[[Any], Any]) -> None:
    params = _params()
    optimizer = PULLED[pair](params)
    _run(optimizer, params, 0, 3)
    params2, second = through((params, optimizer))
    for own, mine in ((optimizer, params), (second, params2)):
        _run(own, mine, 3, 6)
    _assert_alike([p.detach() for p in params2], [p.detach() for p in params])


@pytest.mark.parametrize("pair", SOME)
def test_hooks_run_when_torch_runs_them(pair: str) -> None:
    logs = []
    for make in PAIRS[pair]:
        params, seen = _params(), []
        optimizer = make(params)
        note = seen.append
        optimizer.register_step_pre_hook(lambda o, a, k, note=note: note("pre step"))
        optimizer.register_step_post_hook(lambda o, a, k, note=note: note("post step"))
        optimizer.register_state_dict_pre_hook(lambda o, note=note: note("pre save"))
        optimizer.register_state_dict_post_hook(lambda o, s, note=note: note(f"post save {sorted(s)}"))
        optimizer.register_load_state_dict_pre_hook(lambda o, s, note=note: note(f"pre load {sorted(s)}"))
        optimizer.register_load_state_dict_pre_hook(lambda o, s, note=note: note("first"), prepend=True)
        optimizer.register_load_state_dict_post_hook(lambda o, note=note: note("post load"))
        optimizer.register_load_state_dict_post_hook(lambda o, note=note: note("first after"), prepend=True)
        _run(optimizer, params, 0, 2)
        optimizer.load_state_dict(optimizer.state_dict())
        logs.append(seen)
    assert logs[0] == logs[1]


@pytest.mark.parametrize("pair", [*PULLED, "AdamSPD default"])
def test_a_post_hook_may_replace_the_state_dict_and_a_pre_hook_put_it_back(pair: str) -> None:
    make = PULLED[pair] if pair in PULLED else PAIRS[pair][0]
    params = _params()
    optimizer = make(params)
    _run(optimizer, params, 0, 2)
    plain = optimizer.state_dict()
    optimizer.register_state_dict_post_hook(lambda o, s: {"mine": s})
    optimizer.register_load_state_dict_pre_hook(lambda o, s: s["mine"])
    saved = copy.deepcopy(optimizer.state_dict())
    assert "mine" in saved
    _run(optimizer, params, 2, 4)
    optimizer.load_state_dict(saved["mine"] if "mine" not in saved else saved)
    _assert_alike(optimizer.state_dict()["mine"]["state"], copy.deepcopy(saved["mine"]["state"]))
    assert plain["param_groups"] == saved["mine"]["param_groups"]


@pytest.mark.parametrize("pair", SOME)
def test_groups_have_their_own_options_and_take_new_ones(pair: str) -> None:
    runs = []
    for make in PAIRS[pair]:
        params = _params()
        optimizer = make([{"params": params[:1], "lr": 0.05}, {"params": params[1:3]}])
        optimizer.defaults["lr"] = 0.03
        _run(optimizer, params, 0, 2)
        optimizer.add_param_group({"params": params[3]})
        if HELD:
            HELD.pop().bind()
        _run(optimizer, params, 2, 4)
        optimizer.param_groups[0]["lr"] = 0.0
        _run(optimizer, params, 4, 5)
        runs.append(params)
        assert [g["lr"] for g in optimizer.param_groups][2] == 0.03
    _assert_alike([p.detach() for p in runs[0]], [p.detach() for p in runs[1]])


def _both(make: Make) -> list[Any]:
    """What torch and we make of the same call: the exception's classes, or None."""
    found = []
    for kind in (optim.Adam, AdamSPD):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                make(kind)
                found.append(None)
            except Exception as error:
                found.append(error)
    return found


_W = nn.Parameter(torch.ones(2))
BAD: dict[str, Make] = {
    "lr": lambda kind: kind([_W], lr=-1.0),
    "eps": lambda kind: kind([_W], eps=-1e-8),
    "beta1": lambda kind: kind([_W], betas=(1.0, 0.9)),
    "beta2": lambda kind: kind([_W], betas=(0.9, -0.1)),
    "weight_decay": lambda kind: kind([_W], weight_decay=-1.0),
    "tensor lr with foreach": lambda kind: kind([_W], lr=torch.tensor(0.1), foreach=True),
    "tensor lr of two elements": lambda kind: kind([_W], lr=torch.ones(2)),
    "fused and foreach": lambda kind: kind([_W], fused=True, foreach=True),
    "no parameters": lambda kind: kind([]),
    "a tensor": lambda kind: kind(_W),
    "a set": lambda kind: kind([{"params": {_W}}]),
    "a number": lambda kind: kind([3]),
    "no leaf": lambda kind: kind([_W * 2]),
    "twice in two groups": lambda kind: kind([{"params": [_W]}, {"params": [_W]}]),
    "some without names": lambda kind: kind([("w", _W), nn.Parameter(torch.ones(1))]),
    "another number of groups": lambda kind: kind([_W]).load_state_dict(
        kind([{"params": [_W]}, {"params": [nn.Parameter(torch.ones(1))]}]).state_dict()
    ),
    "another number of parameters": lambda kind: kind([_W]).load_state_dict(
        kind([_W, nn.Parameter(torch.ones(1))]).state_dict()
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_torch_refuses_is_refused_alike(bad: str) -> None:
    theirs, ours = _both(BAD[bad])
    assert theirs is not None
    assert isinstance(ours, type(theirs)), f"torch: {theirs!r}, ours: {ours!r}"


@pytest.mark.parametrize("pair", [*SOME, *PULLED])
def test_a_step_leaves_autograd_as_it_was(pair: str) -> None:
    make = PULLED[pair] if pair in PULLED else PAIRS[pair][0]
    params = _params()
    before = [p.detach().clone() for p in params]
    optimizer = make(params)
    seen: list[bool] = []

    def closure() -> Tensor:
        seen.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        assert isinstance(loss, Tensor)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    second = optimizer.step(closure)
    assert first == sum((p**2).sum() for p in before)
    assert second <= first
    assert seen == [True, True]
    assert torch.is_grad_enabled()
    assert all(p.requires_grad and p.is_leaf and p.grad_fn is None for p in params)


@pytest.mark.parametrize("pair", [*SOME, *PULLED])
def test_without_gradients_nothing_happens(pair: str) -> None:
    make = PULLED[pair] if pair in PULLED else PAIRS[pair][0]
    params = _params()
    before = [p.detach().clone() for p in params]
    optimizer = make(params)
    optimizer.step()
    assert not optimizer.state
    _assert_alike([p.detach() for p in params], before)
    _run(optimizer, params, 1, 2)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize("pair", ["AdamSPD", "AdamSPD fused"])
def test_a_tensor_lr_is_read_and_never_written(pair: str) -> None:
    runs = []
    for lr in (0.01, torch.tensor(0.01)):
        params = _params(dtype=torch.float64)
        optimizer = PULLED[pair](params)
        optimizer.param_groups[0]["lr"] = lr
        _run(optimizer, params, 1, 4)
        runs.append(params)
    assert torch.equal(torch.as_tensor(lr), torch.tensor(0.01))
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)  # 0.01 is float32 in the tensor


@pytest.mark.parametrize("make", [optim.Adam, lambda p: AdamSPD(p), PULLED["AdamSPD"]])
def test_older_checkpoints_load(make: Make) -> None:
    """Steps were numbers, and groups had fewer keys."""
    params = _params()
    optimizer = make(params)
    _run(optimizer, params, 1, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = float(state["step"])
    for group in saved["param_groups"]:
        for key in ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "max_pull"):
            group.pop(key, None)
    optimizer.load_state_dict(saved)
    assert all(isinstance(state["step"], Tensor) for state in optimizer.state.values())
    _run(optimizer, params, 3, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_loaded_moments_take_the_dtype_of_the_parameter(dtype: torch.dtype) -> None:
    saved = AdamSPD(_params(), weight_decay=LAMBDA, anchor="zero")
    params = list(saved.param_groups[0]["params"])
    _run(saved, params, 1, 2)
    others = _params(dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # half precision without masters
        optimizer = AdamSPD(others, weight_decay=LAMBDA, anchor="zero")
    optimizer.load_state_dict(saved.state_dict())
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {dtype}
    assert {state["step"].dtype for state in optimizer.state.values()} == {torch.float32}
    _run(optimizer, others, 2, 3)


def test_what_differs_from_adam_in_the_signature_is_known() -> None:
    """AdamSPD has no `differentiable`: its step is not to be differentiated through."""
    with pytest.raises(TypeError, match="differentiable"):
        AdamSPD([_W], differentiable=True)  # type: ignore[call-arg]
