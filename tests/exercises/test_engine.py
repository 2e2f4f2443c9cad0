"""Adding an engine: `flat_buffer.py` is all that a newcomer writes, and rules are exact on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_spd import SPDConfig, attach
from sharded_spd.engines.base import EngineAdapter
from sharded_spd.errors import AnchorError
from tests.exercises.flat_buffer import FlatBuffer, FlatBufferAdapter, attach_flat
from tests.support.compare import assert_float64_parity
from tests.support.engines import Engine
from tests.support.launch import Task

STEPS, LR = 8, 0.05


def _model() -> nn.Sequential:
    """Of 52 elements in four layers: chunks end inside of layers, and on four ranks each lacks some."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def _batches() -> Tensor:
    """Inputs and targets of each step, `[STEPS, 2, 8, 3]`."""
    return torch.randn(STEPS, 2, 8, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def _adam(*params: Tensor) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=LR)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach() for name, param in model.named_parameters()}


def equals_one_process(engine: Engine, *, rule: str) -> None:
    """Weights, metrics and the rule's state after each step; the state is saved and loaded in between."""
    config, one, flat = SPDConfig(rule=rule, weight_decay=1.5), _model(), FlatBuffer(_model(), _everyone())
    optimizers = _adam(*one.parameters()), _adam(flat.chunk)
    expected, projector = attach(optimizers[0], one, config), attach_flat(flat, optimizers[1], config)
    assert projector.fingerprint == expected.fingerprint
    pulled, first = 0.0, {}
    for inputs, targets in _batches():
        optimizers[0].zero_grad()
        (one(inputs) - targets).square().mean().backward()
        optimizers[0].step()
        mine = slice(engine.rank, None, engine.world)
        flat.backward((flat.model(inputs[mine]) - targets[mine]).square().mean())
        optimizers[1].step()
        flat.gather()
        assert_float64_parity(_weights(flat.model), _weights(one))
        pulled += expected.metrics()["activation_rate"]
        state = projector.state_dict()
        _assert_same_state(state["layers"], expected.state_dict()["layers"])
        first = first or state
        projector.load_state_dict(first)
        _assert_same_state(projector.state_dict()["layers"], first["layers"])
        projector.load_state_dict(state)
    assert pulled > 1, "hardly anything was pulled: the test shows nothing"


def _everyone() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def _assert_same_state(got: Mapping[str, Mapping[str, Any]], want: Mapping[str, Mapping[str, Any]]) -> None:
    assert got.keys() == want.keys()
    for fqn, layer in want.items():
        assert got[fqn].keys() == layer.keys()
        for name, values in layer.items():
            torch.testing.assert_close(got[fqn][name], values, rtol=1e-9, atol=1e-12)  # float64 sums' order


def guards_hold(engine: Engine) -> None:
    """Weights that one rank loads after the snapshot stop all ranks, though most cannot see them."""
    flat = FlatBuffer(_model(), _everyone())
    optimizer = _adam(flat.chunk)
    attach_flat(flat, optimizer, SPDConfig())
    if engine.rank == engine.world - 1:
        flat.chunk.data += 1
    flat.backward(flat.model(_batches()[0, 0]).square().mean())
    with pytest.raises(AnchorError, match=r"2 layer.*'2\.weight'"):
        optimizer.step()


TASKS = [
    *(
        Task(f"flat-{rule}", "single", world, equals_one_process, {"rule": rule})
        for world in (1, 2, 4)
        for rule in ("spd", "ftp")
    ),
    Task("flat-guards", "single", 4, guards_hold),
]


@pytest.mark.parametrize("task", [pytest.param(task, marks=task.marks, id=task.id) for task in TASKS])
def test_it_is_exact(task: Task, distributed: Callable[[Task], None]) -> None:
    distributed(task)


def test_it_gives_all_that_an_engine_has_to() -> None:
    asked = {*vars(EngineAdapter), *EngineAdapter.__annotations__}
    public = {name for name in asked if not name.startswith("_")}
    given = {*vars(FlatBufferAdapter), "optimizers", "names", "named"}
    assert public == {name for name in given if not name.startswith("_")}
