"""What torch gives its optimizers in its tests, a database of inputs and errors, given to ours, too."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.testing._internal.common_optimizers import OptimizerInfo, optim_db

from sharded_spd import AdamSPD, SPDConfig, attach
from sharded_spd.errors import BindingError

STEPS = 4
_BY_NAME = {info.optim_cls.__name__: info for info in optim_db}
_CLOSURES = {"LBFGS", "SparseAdam"}
"""One evaluates its closure several times, which is refused; the other takes sparse gradients only."""


def _inputs(name: str) -> Iterator[Any]:
    for given in _BY_NAME[name].optim_inputs_func(device="cpu"):
        yield pytest.param(name, given.kwargs, id=f"{name}-{given.desc}")


def _params(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5, 2), (3, 4))]


def _train(params: list[torch.nn.Parameter], optimizer: Optimizer, begin: int = 0) -> list[torch.Tensor]:
    for step in range(begin, begin + STEPS):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach().clone() for p in params]


def _make(info: OptimizerInfo, params: Any, kwargs: dict[str, Any]) -> Optimizer:
    return info.optim_cls(params, **copy.deepcopy(kwargs))


@pytest.mark.parametrize(
    ("name", "kwargs"), [case for n in _BY_NAME if n not in _CLOSURES for case in _inputs(n)]
)
def test_attach_at_lambda_0_is_the_base(name: str, kwargs: dict[str, Any]) -> None:
    """To the last bit, on what torch tries it with; also after its state went through a state dict."""
    ends = []
    for ours in (False, True):
        params = _params()
        optimizer = _make(_BY_NAME[name], params, kwargs)
        if ours:
            with pytest.warns(UserWarning, match="is 0 for every layer"):
                attach(optimizer, config=SPDConfig(weight_decay=0.0))
        _train(params, optimizer)
        again = [torch.nn.Parameter(p.detach().clone()) for p in params]
        resumed = _make(_BY_NAME[name], again, kwargs)
        if ours:
            with pytest.warns(UserWarning, match="is 0 for every layer"):
                attach(resumed, config=SPDConfig(weight_decay=0.0))
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        ends.append((_train(params, optimizer, STEPS), _train(again, resumed, STEPS)))
    (plain, plain_resumed), (attached, attached_resumed) = ends
    assert all(map(torch.equal, plain, attached))
    assert all(map(torch.equal, plain_resumed, attached_resumed))


@pytest.mark.parametrize(("base", "kwargs"), [*_inputs("Adam"), *_inputs("AdamW")])
@pytest.mark.parametrize("way", [{}, {"foreach": True}, {"fused": True}], ids=["loop", "foreach", "fused"])
def test_adam_spd_is_torchs_adam(base: str, kwargs: dict[str, Any], way: dict[str, bool]) -> None:
    """At lambda 0 Adam, by rule "decay" AdamW, to the last bit."""
    own = {"weight_decay": 0.01, "rule": "decay"} if base == "AdamW" else {"weight_decay": 0.0}
    own |= {k: v for k, v in kwargs.items() if k != "weight_decay" or base == "AdamW"}
    theirs = {k: v for k, v in own.items() if k != "rule"}
    params, others = _params(), _params()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is 0 for every layer")
        ours = _train(params, AdamSPD(params, **copy.deepcopy(own), **way))
    expected = _train(others, _BY_NAME[base].optim_cls(others, **copy.deepcopy(theirs), **way))
    assert all(map(torch.equal, ours, expected))


_ERRORS = list(_BY_NAME["Adam"].optim_error_inputs_func(device="cpu", dtype=torch.float32))


@pytest.mark.parametrize("error", _ERRORS, ids=[e.error_regex[:40] for e in _ERRORS])
@pytest.mark.parametrize(
    "make",
    [AdamSPD, lambda *given, **own: attach(torch.optim.Adam(*given, **own))],
    ids=["AdamSPD", "attach"],
)
def test_bad_arguments_raise_as_in_torch(error: Any, make: Callable[..., Any]) -> None:
    """An error of the same kind where torch raises; a warning where it warns."""
    given = error.optimizer_error_input
    params = _params() if given.params is None else given.params  # torch looks at the numbers first
    if issubclass(error.error_type, Warning):
        # Twice in a group, which torch puts up with, is one layer too many to bind.
        with pytest.warns(error.error_type, match=error.error_regex), pytest.raises(BindingError):
            make(params, **given.kwargs)
        return
    with pytest.raises(error.error_type):
        make(params, **given.kwargs)
