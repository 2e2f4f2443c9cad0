"""AdamSPD steps as the oracle does, however it is configured."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sharded_spd import AdamSPD
from tests.reference.oracle import BaseOracle, LayerOptions, Oracle
from tests.support.compare import assert_bits_equal, assert_layers_close
from tests.support.local import LAMBDA, LR, SPD, follow, give, gradients, layers, parameters, values


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_follows_oracle(foreach: bool | None, amsgrad: bool, maximize: bool) -> None:
    start = layers()
    params = parameters(start)
    optimizer = AdamSPD(
        params.items(), lr=LR, weight_decay=LAMBDA, foreach=foreach, amsgrad=amsgrad, maximize=maximize
    )
    follow(optimizer, params, Oracle(start, start, SPD, amsgrad=amsgrad, maximize=maximize), gradients(10))


@pytest.mark.parametrize("amsgrad", [False, True])
def test_fused_follows_oracle(amsgrad: bool) -> None:
    start = layers()
    params = parameters(start)
    optimizer = AdamSPD(params.items(), lr=LR, weight_decay=LAMBDA, fused=True, amsgrad=amsgrad)
    # The fused kernel takes its bias corrections in another order.
    follow(optimizer, params, Oracle(start, start, SPD, amsgrad=amsgrad), gradients(10), relative=1e-9)


def test_betas_and_eps() -> None:
    start = layers()
    params = parameters(start)
    options = replace(SPD, betas=(0.7, 0.9), eps=1e-3)
    optimizer = AdamSPD(params.items(), lr=LR, betas=(0.7, 0.9), eps=1e-3, weight_decay=LAMBDA)
    follow(optimizer, params, Oracle(start, start, options), gradients(10))


@pytest.mark.parametrize("fused", [False, True])
def test_tensor_lr(fused: bool) -> None:
    """torch takes one with foreach only where it is capturable, which needs a GPU."""
    start = layers()
    params = parameters(start)
    lr = torch.tensor(LR, dtype=torch.float64)
    optimizer = AdamSPD(params.items(), lr=lr, weight_decay=LAMBDA, fused=fused)
    oracle = Oracle(start, start, SPD)
    follow(optimizer, params, oracle, gradients(5), relative=1e-9)
    lr.fill_(LR / 4)
    oracle.options = replace(SPD, lr=LR / 4)
    follow(optimizer, params, oracle, gradients(5), relative=1e-9, pulls=False)


@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
@pytest.mark.filterwarnings("ignore:.*half precision.*")
def test_lower_precision(dtype: torch.dtype, relative: float) -> None:
    """The base rounds as torch's does; what is left is the pull's own last place."""
    start = layers(dtype=dtype)
    params = parameters(start)
    options = LayerOptions(lr=LR, weight_decay=LAMBDA, eps=1e-4)
    optimizer = AdamSPD(params.items(), lr=LR, weight_decay=LAMBDA, eps=1e-4)
    oracle = BaseOracle(
        start, start, options, lambda given: torch.optim.Adam(given.values(), lr=LR, eps=1e-4)
    )
    follow(optimizer, params, oracle, gradients(10, dtype=dtype), relative=relative)
    assert all(p.dtype == dtype for p in params.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_warns_once(dtype: torch.dtype, recwarn: pytest.WarningsRecorder) -> None:
    """Pulls below a unit in the last place vanish without float32 masters."""
    params = parameters(layers(dtype=dtype))
    optimizer = AdamSPD(params.items(), lr=LR, weight_decay=LAMBDA, max_pull=1.0)
    for given in gradients(3, dtype=dtype):
        give(params, given)
        optimizer.step()
    assert ["half precision" in str(w.message) for w in recwarn] == [True]


def test_missing_gradients() -> None:
    start = layers()
    params = parameters(start)
    optimizer = AdamSPD(params.items(), lr=LR, weight_decay=LAMBDA)
    grads = gradients(10)
    del grads[2]["body.weight"], grads[3]["body.weight"], grads[5]["norm.weight"]
    grads[7] = {}
    follow(optimizer, params, Oracle(start, start, SPD), grads)


def test_closure_is_evaluated_once_with_grad() -> None:
    start = layers()
    params = parameters(start)
    optimizer = AdamSPD(params.items(), lr=LR, weight_decay=LAMBDA)
    oracle = Oracle(start, start, SPD)
    for t, given in enumerate(gradients(8)):
        calls = 0

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = sum(((params[name] * g).sum() for name, g in given.items()), torch.zeros(()))  # noqa: B023
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        assert calls == 1
        assert isinstance(loss, Tensor)
        oracle.step(given)
        assert_layers_close(values(params), oracle.weights, relative=1e-10, label=f"step {t}:")


def test_step_hooks_run_around_the_step() -> None:
    """A user's hooks may change the gradients before, and see the finished weights after."""
    start = layers()
    params = parameters(start)
    optimizer = AdamSPD(params.items(), lr=LR, weight_decay=LAMBDA)
    oracle = Oracle(start, start, SPD)
    seen: list[str] = []
    doubled: list[dict[str, Tensor]] = []

    def before(opt: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        seen.append("before")
        for p in params.values():
            if p.grad is not None:
                p.grad.mul_(2)

    def after(opt: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        seen.append("after")
        doubled.append(values(params))

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    for given in gradients(6):
        give(params, given)
        optimizer.step()
        oracle.step({name: 2 * g for name, g in given.items()})
        assert_layers_close(doubled[-1], oracle.weights, relative=1e-10, label="the post-hook sees")
    assert seen == ["before", "after"] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_lambda_zero_is_torch_adam(dtype: torch.dtype, foreach: bool) -> None:
    start = layers(dtype=dtype)
    ours, theirs = parameters(start), parameters(start)
    optimizer = AdamSPD(ours.items(), lr=LR, weight_decay=0.0, foreach=foreach)
    reference = torch.optim.Adam(theirs.values(), lr=LR, foreach=foreach)
    for given in gradients(10, dtype=dtype):
        give(ours, given)
        give(theirs, given)
        optimizer.step()
        reference.step()
        assert_bits_equal(values(ours), values(theirs))


@pytest.mark.parametrize("rule", ["spd", "none"])
def test_no_strength_fused_is_torch_adam(rule: str) -> None:
    start = layers(dtype=torch.float32)
    ours, theirs = parameters(start), parameters(start)
    optimizer = AdamSPD(ours.items(), lr=LR, weight_decay=0.0, rule=rule, fused=True)
    reference = torch.optim.Adam(theirs.values(), lr=LR, fused=True)
    for given in gradients(10, dtype=torch.float32):
        give(ours, given)
        give(theirs, given)
        optimizer.step()
        reference.step()
        assert_bits_equal(values(ours), values(theirs))


@pytest.mark.parametrize("foreach", [False, True])
def test_decay_is_torch_adamw(foreach: bool) -> None:
    start = layers()
    ours, theirs = parameters(start), parameters(start)
    optimizer = AdamSPD(ours.items(), lr=LR, weight_decay=0.1, rule="decay", foreach=foreach)
    reference = torch.optim.AdamW(theirs.values(), lr=LR, weight_decay=0.1, foreach=foreach)
    for given in gradients(100):
        give(ours, given)
        give(theirs, given)
        optimizer.step()
        reference.step()
    assert_layers_close(values(ours), values(theirs), relative=1e-12)


def test_max_pull_clamps() -> None:
    start = layers()
    params = parameters(start)
    options = LayerOptions(lr=LR, weight_decay=20.0, max_pull=0.5)
    optimizer = AdamSPD(params.items(), lr=LR, weight_decay=20.0, max_pull=0.5)
    follow(optimizer, params, Oracle(start, start, options), gradients(10))


def test_sparse_gradient_is_refused_by_name() -> None:
    p = nn.Parameter(torch.randn(4, 3))
    optimizer = AdamSPD([("table.weight", p)], lr=LR, weight_decay=LAMBDA)
    before = p.detach().clone()
    p.grad = torch.randn(4, 3).to_sparse()
    with pytest.raises((RuntimeError, TypeError), match="sparse"):
        optimizer.step()
    assert torch.equal(p.detach(), before)


def test_complex_parameters_are_refused() -> None:
    p = nn.Parameter(torch.randn(4, dtype=torch.complex64))
    with pytest.raises(TypeError, match="complex"):
        AdamSPD([("phase", p)], lr=LR, weight_decay=LAMBDA)


def test_noncontiguous_parameters() -> None:
    start = layers()
    params = {
        name: nn.Parameter(w.t().contiguous().t()) if w.ndim == 2 else nn.Parameter(w.clone())
        for name, w in start.items()
    }
    assert not params["body.weight"].is_contiguous()
    optimizer = AdamSPD(params.items(), lr=LR, weight_decay=LAMBDA)
    follow(optimizer, params, Oracle(start, start, SPD), gradients(8))


def test_channels_last_and_scalar_parameters() -> None:
    generator = torch.Generator().manual_seed(0)
    start = {"conv": torch.randn(3, 2, 4, 4, generator=generator).double(), "t": torch.tensor(0.5).double()}
    conv = start["conv"].to(memory_format=torch.channels_last)
    params = {"conv": nn.Parameter(conv.clone()), "t": nn.Parameter(start["t"].clone())}
    optimizer = AdamSPD(params.items(), lr=LR, weight_decay=LAMBDA)
    grads = [
        {name: torch.randn(w.shape, generator=generator).double() for name, w in start.items()}
        for _ in range(10)
    ]
    follow(optimizer, params, Oracle(start, start, SPD), grads)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("when", [0, 4])
def test_copies_continue_identically(how: str, when: int) -> None:
    """A copy of model and optimizer, made at the start or in the middle, goes on as the original does."""
    start = layers()
    grads = gradients(8)
    params = parameters(start)
    optimizer = AdamSPD(params.items(), lr=LR, weight_decay=LAMBDA)
    for given in grads[:when]:
        give(params, given)
        optimizer.step()
    both = (params, optimizer)
    other, twin = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert twin is not optimizer
    oracle = Oracle(start, start, SPD)
    for given in grads[:when]:
        oracle.step(given)
    pulled = 0
    for given in grads[when:]:
        for some, opt in ((params, optimizer), (other, twin)):
            give(some, given)
            opt.step()
        pulled += sum(stats.s > 0 for stats in oracle.step(given).values())
        assert_layers_close(values(params), oracle.weights, relative=1e-10)
        assert_bits_equal(values(other), values(params))
    assert pulled >= 1
    assert twin.projector is not optimizer.projector


def test_methods_keep_torch_parameter_names() -> None:
    """`load_state_dict`, `step` and the others are called by keyword."""
    for name, method in inspect.getmembers(torch.optim.Optimizer, inspect.isfunction):
        if name in vars(AdamSPD) and name != "__init__":
            theirs = list(inspect.signature(method).parameters)
            ours = list(inspect.signature(getattr(AdamSPD, name)).parameters)
            assert ours == theirs, name


def test_signature_is_the_documented_one() -> None:
    parameters_ = inspect.signature(AdamSPD).parameters
    assert list(parameters_) == (
        "params lr betas eps weight_decay amsgrad "
        "maximize foreach capturable anchor rule fused model max_pull".split()
    )
    keyword_only = [name for name, p in parameters_.items() if p.kind is p.KEYWORD_ONLY]
    assert keyword_only == list(parameters_)[6:]
    assert isinstance(AdamSPD(parameters(layers()).items(), weight_decay=1.0), torch.optim.Optimizer)
