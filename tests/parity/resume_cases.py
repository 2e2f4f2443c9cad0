"""A run that stops and goes on: at the same world size to the last bit, at another as the oracle does."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh

from tests.parity.cases import SPD, gradients, tensors
from tests.reference.oracle import LayerOptions, Oracle
from tests.support.compare import assert_bits_equal, assert_float64_parity
from tests.support.engines import Engine, Fsdp2
from tests.support.training import Form, Training, anchor_file


def same_world(engine: Engine, *, form: Form, source: str) -> None:
    """`state_dict` and `load_state_dict` of optimizer and projector; the next steps have the same bits."""
    start = tensors(dtype=torch.float32)
    anchor: Any = anchor_file(engine, tensors(dtype=torch.bfloat16, seed=3)) if source == "file" else source
    first = Training(engine, start, SPD, form=form, anchor=anchor)
    grads = gradients(start, 9)
    for given in grads[:4]:
        first.step(given)
    weights = {name: p.detach().clone() for name, p in first.params.items()}
    saved = copy.deepcopy(engine.state_dict(first.optimizer))
    own = copy.deepcopy(first.projector.state_dict())
    second = Training(engine, start, SPD, form=form, anchor=anchor)
    with torch.no_grad():
        for name, p in second.params.items():
            p.copy_(weights[name])
    second.optimizer.load_state_dict(state_dict=saved)
    second.projector.load_state_dict(state_dict=own)
    second.steps = first.steps
    pulled = 0
    for given in grads[4:]:
        first.step(given)
        second.step(given)
        assert_bits_equal(second.weights(), first.weights())
        pulled += sum(layer["s"] > 0 for layer in second.projector.metrics()["layers"].values())
    anywhere = torch.tensor(pulled)  # a rank may know of its own layers only
    dist.all_reduce(anywhere)
    assert anywhere >= 1


def resharded(engine: Engine, *, form: Form) -> None:
    """torch.distributed.checkpoint: saved on four ranks, loaded on four, two and one."""
    start = tensors()
    reload_everywhere(engine, start, SPD, Oracle(start, start, SPD), form=form)


def reload_everywhere(
    engine: Engine, start: dict[str, Tensor], options: LayerOptions, oracle: Oracle, *, form: Form
) -> None:
    """Trains, saves, and goes on from the checkpoint on all ranks, on two of them, and on one."""
    grads = gradients(start, 10)
    training = Training(engine, start, options, form=form)
    for given in grads[:5]:
        training.step(given)
        oracle.step(given)
    folder = str(engine.scratch / "checkpoint")
    dcp.save(_state(training), checkpoint_id=folder)

    _go_on(Training(engine, start, options, form=form), copy.deepcopy(oracle), grads[5:], folder, None)
    pair = dist.new_group([0, 1])
    mesh = DeviceMesh("cpu", [0, 1])
    if engine.rank < 2:
        half = Training(_Pair(engine.scratch, mesh), start, options, form=form)
        _go_on(half, copy.deepcopy(oracle), grads[5:], folder, pair)
    if engine.rank == 0:
        alone = Training(Engine(engine.scratch), start, options, form=form)
        _go_on(alone, copy.deepcopy(oracle), grads[5:], folder, None, alone=True)
    dist.barrier()


class _Pair(Fsdp2):
    """FSDP2 over the first two ranks of a larger world."""

    def __init__(self, scratch: Any, mesh: DeviceMesh) -> None:
        super().__init__(scratch)
        self._mesh = mesh

    def mesh(self) -> DeviceMesh:
        return self._mesh

    @property
    def data_parallel(self) -> tuple[int, int]:
        return self._mesh.get_local_rank(), 2


def _state(training: Training) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(training.model),
        "optim": get_optimizer_state_dict(training.model, training.optimizer),
        "spd": training.projector,
    }


def _go_on(
    training: Training,
    oracle: Oracle,
    grads: list[dict[str, Tensor]],
    folder: str,
    group: dist.ProcessGroup | None,
    *,
    alone: bool = False,
) -> None:
    state = _state(training)
    dcp.load(state, checkpoint_id=folder, process_group=group, no_dist=alone)
    set_model_state_dict(training.model, state["model"])
    set_optimizer_state_dict(training.model, training.optimizer, optim_state_dict=state["optim"])
    pulled = 0
    for t, given in enumerate(grads):
        training.step(given)
        pulled += sum(stats.s != 0 for stats in oracle.step(given).values())
        assert_float64_parity(training.weights(), oracle.weights, label=f"step {t} after loading:")
    assert pulled >= 1
