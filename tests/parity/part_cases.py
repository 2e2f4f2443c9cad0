"""What an optimizer is given: a stage of a pipeline, parameters that the model lacks, one too many."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor

from sharded_spd import AdamSPD, SPDConfig, attach
from sharded_spd.errors import BindingError, ConfigError
from tests.parity.cases import SPD, assert_as_good, gradients, tensors
from tests.reference.oracle import Oracle
from tests.support.engines import Engine
from tests.support.models import Probe
from tests.support.refusals import refused
from tests.support.training import Form, Training

_SHAPES = {
    "embed.weight": (6, 4),
    "layers.0.weight": (5, 3),
    "layers.0.bias": (5,),
    "layers.1.weight": (3, 5),
    "layers.2.weight": (4, 3),
    "layers.3.weight": (2, 4),
    "head.weight": (3, 2),
}
_SHARES = dict(zip((name for name in _SHAPES if "bias" not in name), (1, 0.8, 0.6, 0.4, 0.2, 0), strict=True))


def _names(rank: int) -> list[str]:
    """Of the layers of a stage of two, under the whole model's names."""
    return list(_SHAPES)[:4] if rank == 0 else list(_SHAPES)[4:]


def maps_of_a_stage(engine: Engine) -> None:
    """Each rank's model holds other layers: refused, unless the whole model's order is given."""
    start = {name: w for name, w in tensors(_SHAPES).items() if name in _names(engine.rank)}
    model = Probe(start)
    stage = PipelineStage(model, engine.rank, engine.world, torch.device("cpu"))
    given = {"params": list(model.named_parameters()), "rule": "maps"}
    for action in (
        lambda: AdamSPD([dict(given)], model=model),
        lambda: AdamSPD([dict(given)]),
        lambda: attach(torch.optim.Adam(model.parameters()), model, SPDConfig(rule="maps")),
    ):
        refused(engine, action, (ConfigError,), "rule 'maps' does not know where.*a stage of a pipeline")
    config = SPDConfig(rule="maps", rule_options={"order": list(_SHAPES)}, weight_decay=SPD.weight_decay)
    optimizer = torch.optim.Adam(model.parameters(), lr=SPD.lr)
    attach(optimizer, model, config)
    options = {name: replace(SPD, weight_decay=SPD.weight_decay * _SHARES.get(name, 0.0)) for name in start}
    oracle = Oracle(start, start, options)
    for t, drawn in enumerate(gradients(start, 6)):
        model(drawn).backward()
        optimizer.step()
        optimizer.zero_grad()
        oracle.step(drawn)
        got = {name: p.detach() for name, p in model.named_parameters()}
        assert_as_good(got, oracle.weights, start, label=f"step {t}:")
    assert stage.stage_index == engine.rank


def maps_of_a_sharded_stage(engine: Engine) -> None:
    """A pipeline of one's own, by the mesh that the shards' was cut out of."""
    start = {name: w for name, w in tensors(_SHAPES).items() if name in _names(engine.rank)}
    mesh = init_device_mesh("cpu", (engine.world, 1), mesh_dim_names=("pp", "dp"))
    model = fully_shard(Probe(start), mesh=mesh["dp"])
    refused(
        engine,
        lambda: AdamSPD(model.named_parameters(), rule="maps", model=model),
        (ConfigError,),
        "rule 'maps' does not know where.*a stage of a pipeline",
    )
    AdamSPD(model.named_parameters(), rule="spd", weight_decay=1.0, model=model)


def sharded_after_the_optimizer_was_built(engine: Engine, *, form: Form) -> None:
    """The optimizer holds parameters that `fully_shard` has put others in place of."""
    start = tensors()
    model = Probe(start)
    optimizer: torch.optim.Optimizer
    if form == "adam_spd":
        optimizer = AdamSPD(model.named_parameters(), lr=SPD.lr, weight_decay=SPD.weight_decay, model=model)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=SPD.lr)
        attach(optimizer, model, SPDConfig())
    wrapped = engine.wrap(model)
    wrapped(gradients(start, 1)[0]).backward()
    refused(engine, optimizer.step, (BindingError,), r"another parameter now.*sharded.*after that")


def unknown_parameter_on_one_rank(engine: Engine, *, form: Form) -> None:
    """The gradients behind it are Partial: the other ranks wait for this one to redistribute them."""
    training = Training(engine, tensors(), SPD, form=form)
    training.backward(gradients(tensors(), 1)[0])
    assert any(_is_partial(p) for p in training.params.values())
    if engine.rank == 1:
        training.optimizer.param_groups[0]["params"].insert(0, torch.nn.Parameter(torch.ones(2)))
    refused(engine, training.optimizer.step, (BindingError,), "is not bound")


def _is_partial(param: torch.Tensor) -> bool:
    grad = param.grad
    return isinstance(grad, DTensor) and any(p.is_partial() for p in grad.placements)
