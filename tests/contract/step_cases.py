"""Steps that go wrong on one rank or in the middle; each function runs on every rank of a launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

from sharded_spd import AdamSPD, SPDConfig, attach
from sharded_spd.errors import BindingError, ConfigError
from sharded_spd.kernels.choose import kernels_for
from sharded_spd.kernels.compile import load_library
from sharded_spd.kernels.switch import SWITCH
from sharded_spd.projection import reduction
from tests.parity.cases import SPD, gradients, tensors
from tests.reference.oracle import Oracle
from tests.support.compare import assert_float64_parity
from tests.support.engines import Engine
from tests.support.models import Probe
from tests.support.refusals import refused
from tests.support.training import Form, Training


def _whole(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach().clone() for p in params]


def deferred_optimizer_steps_twice(engine: Engine, *, rule: str) -> None:
    """A step under way owns its slices: a second one of the same layers settles the first."""
    ends = []
    for kind in ("per_inner_step", "per_step"):
        model = engine.wrap(Probe(tensors()))
        params = list(model.parameters())
        halves = params[::2], params[1::2]
        bases = [torch.optim.Adam(half, lr=0.01) for half in halves]
        projector = attach(bases, model, SPDConfig(rule=rule, weight_decay=3.0, reduction=kind))
        for t in range(9):
            which = 1 if t % 3 else 0  # two steps of one for each of the other
            for i, p in enumerate(halves[which]):
                p.grad = _gradient(p, 10 * t + i)
            bases[which].step()
            bases[which].zero_grad()
        projector.state_dict()  # settles what still waits
        ends.append(_whole(params))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def _gradient(param: Tensor, seed: int) -> Tensor:
    """The same on all ranks, placed as the parameter is."""
    whole = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed), dtype=param.dtype)
    if not isinstance(param, DTensor):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, param.device_mesh, param.placements, src_data_rank=None)


def scalars_that_differ(engine: Engine, *, form: Form) -> None:
    """A schedule that reads a file of its own node, say; the message has both values."""
    start = tensors()
    training = Training(engine, start, SPD, form=form)
    first, *others = gradients(start, 3)
    training.step(first)
    group = training.optimizer.param_groups[0]
    for given in others:
        group["lr"] = 0.5 if engine.rank == engine.world - 1 else 0.25
        training.backward(given)
        refused(engine, training.update, (ConfigError,), "lr of", r"0\.5", r"0\.25", "rank")
        training.engine.zero_grad(training.model, training.optimizer)


class _Stumbles(torch.optim.Adam):
    """Adam whose next step may raise before it has done anything."""

    stumbles = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if self.stumbles:
            raise OverflowError("this base stumbled")
        return super().step(closure)


def base_that_raises(engine: Engine) -> None:
    """On all ranks it is as if the step had not been; on one, the others are told when that steps again."""
    start = tensors()
    oracle, training = (
        Oracle(start, start, SPD),
        Training(engine, start, SPD, form="attached", make_base=_Stumbles),
    )
    base = training.optimizer
    for t, given in enumerate(gradients(start, 6)):
        training.backward(given)
        if t in (2, 3):
            base.stumbles = True
            refused(engine, base.step, (OverflowError,), "stumbled")
            base.stumbles = False
        training.update()
        oracle.step(given)
        assert_float64_parity(training.weights(), oracle.weights, label=f"step {t}:")
    training.backward(given)
    base.stumbles = engine.rank == 1

    def step_again() -> None:
        try:
            base.step()
        except OverflowError:
            base.stumbles = False
            base.step()

    refused(engine, step_again, (BindingError,), "rank 1|an exception ended")


def step_that_fails_leaves_the_next_one_whole(engine: Engine) -> None:
    """A negative lambda on one rank is refused on all; put right, training goes on, and in step."""
    start = tensors()
    training = Training(engine, start, SPD, form="adam_spd")
    group, grads = training.optimizer.param_groups[0], gradients(start, 4)
    for t, given in enumerate(grads):
        training.backward(given)
        if t == 1:
            good = group["weight_decay"]
            group["weight_decay"] = -1.0 if engine.rank == 0 else good
            refused(engine, training.optimizer.step, (ConfigError,), "-1", "lambda >= 0")
            group["weight_decay"] = good
        training.update()
    steps = [{int(s["step"]) for s in training.optimizer.state.values()}] * engine.world
    dist.all_gather_object(steps, steps[0])
    assert all(found == steps[0] for found in steps)


def group_that_one_rank_has(engine: Engine) -> None:
    """Added on one rank only: every rank says so at the next step, and none waits for another before it."""
    model = engine.wrap(Probe(tensors()))
    params = list(model.named_parameters())
    optimizer = AdamSPD(params[:2], lr=0.01, weight_decay=1.0, model=model)
    if engine.rank == 0:
        optimizer.add_param_group({"params": params[2:]})
    for i, (_, p) in enumerate(params):
        p.grad = _gradient(p, i)
    refused(engine, optimizer.step, (BindingError,), "every rank")


def failure_that_is_heard_late(engine: Engine) -> None:
    """As on a GPU: the rank raises at once, the others when their next step begins, and none waits."""
    start = tensors()
    training = Training(engine, start, SPD, form="adam_spd")
    group, grads = training.optimizer.param_groups[0], gradients(start, 3)
    before, reduction.comes_late = reduction.comes_late, lambda numbers: True
    try:
        training.step(grads[0])
        if engine.rank == 0:
            group["weight_decay"] = -1.0
        training.backward(grads[1])
        if engine.rank == 0:
            with pytest.raises(ConfigError, match="lambda >= 0"):
                training.optimizer.step()
        else:
            training.update()
        group["weight_decay"] = SPD.weight_decay
        refused(engine, training.optimizer.step, (BindingError,), "another rank failed in the step before")
    finally:
        reduction.comes_late = before


def kernels_that_one_rank_lacks(engine: Engine) -> None:
    """A node without a compiler: replicas take plain torch together, so that they stay bit-equal."""
    torch.manual_seed(0)
    model = engine.wrap(Probe(tensors()))
    with pytest.MonkeyPatch.context() as patch:
        if engine.rank == 1:
            patch.setenv(SWITCH, "reference")
        kernels_for.cache_clear()
        load_library.cache_clear()
        try:
            with pytest.warns(UserWarning, match=r"different kernels for cpu tensors \(cpu, reference\)"):
                optimizer = AdamSPD(model.parameters(), lr=0.01, weight_decay=2.0)
            for t in range(5):
                for i, p in enumerate(model.parameters()):
                    p.grad = _gradient(p, 10 * t + i)
                optimizer.step()
        finally:
            kernels_for.cache_clear()
            load_library.cache_clear()
    whole = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    gathered = [torch.empty_like(whole) for _ in range(engine.world)]
    dist.all_gather(gathered, whole)
    assert all(torch.equal(whole, other) for other in gathered)


def rank_without_a_share(engine: Engine) -> None:
    """One parameter and two ranks, and no model given: the rank that steps nothing binds with the other."""
    found = []
    for shared in (False, True):
        torch.manual_seed(0)
        model = engine.wrap(nn.Linear(4, 3, bias=False))
        own = {"lr": 0.05, "weight_decay": 2.0}
        params = list(model.parameters())
        optimizer = ZeroRedundancyOptimizer(params, AdamSPD, **own) if shared else AdamSPD(params, **own)
        for t in range(4):
            params[0].grad = _gradient(params[0], t)
            optimizer.step()
        found.append(params[0].detach().clone())
    torch.testing.assert_close(*found)
