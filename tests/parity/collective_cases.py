"""How much the method says over the network: one small all-reduce per sharded axis and step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from tests.parity.cases import SPD, gradients, tensors
from tests.support.collectives import Collectives
from tests.support.engines import Engine
from tests.support.training import Form, Training


def per_step(engine: Engine, *, form: Form, expected: int, partial: int = 0) -> None:
    """`expected` small all-reduces in a step after the first; `partial` gradients are redistributed."""
    start = tensors(dtype=engine.dtype)
    training = Training(engine, start, SPD, form=form)
    for given in gradients(start, 3):
        training.step(given)
    for given in gradients(start, 2):
        training.backward(given)
        with Collectives() as seen, CommDebugMode() as comm:
            training.optimizer.step()
        training.optimizer.zero_grad()
        training.steps += 1
        assert [op for op, _ in seen.direct] == ["allreduce_"] * expected, f"got {seen.direct}"
        assert len(seen.functional) == partial, f"got {seen.functional}"
        assert comm.get_total_counts() == expected + partial, f"got {comm.get_comm_counts()}"
        for _, numel in seen.direct:
            assert numel <= 8 * len(start) + 8, f"{numel} numbers for {len(start)} layers"


def with_missing_gradients(engine: Engine, *, form: Form, expected: int) -> None:
    """The collective's shape comes from the layout: a step without most gradients sends as much."""
    start = tensors()
    training = Training(engine, start, SPD, form=form)
    most = tuple(start)[1:]
    sizes = []
    for given in gradients(start, 5, missing={3: most}):
        training.backward(given)
        with Collectives() as seen:
            training.optimizer.step()
        training.optimizer.zero_grad()
        training.steps += 1
        sizes.append([numel for _, numel in seen.direct])
    assert len(sizes[2]) == expected
    assert sizes[2] == sizes[3] == sizes[4], f"payloads of the steps: {sizes}"


def naive_form(engine: Engine) -> None:
    """Written with DTensor operations the method takes hundreds of all-reduces on 100 tensors, ours one."""
    start = tensors({f"layer{i}.weight": (8, 8) for i in range(100)})
    given = gradients(start, 1)[0]
    training = Training(engine, start, SPD)
    training.step(given)
    training.backward(given)
    params = training.params.values()
    anchors = [p.detach() * 0.5 for p in params]
    with CommDebugMode() as comm:
        for p, anchor in zip(params, anchors, strict=True):
            _naive(p.detach().clone(), p.grad, anchor)
    assert comm.get_total_counts() >= 300, f"got {comm.get_comm_counts()}"
    with CommDebugMode() as comm:
        training.optimizer.step()
    assert comm.get_total_counts() == 1, f"got {comm.get_comm_counts()}"


def _naive(w: Tensor, grad: Tensor | None, anchor: Tensor) -> None:
    assert isinstance(w, DTensor)
    assert grad is not None
    c = -(grad * (w - anchor)).sum()
    n0 = (w - anchor).norm()
    w.sub_(grad, alpha=0.01)
    n1 = (w - anchor).norm()
    s = torch.where(c < 0, ((n1 - n0) / n1).clamp(min=0), 0.0)
    w.lerp_(anchor, s)
