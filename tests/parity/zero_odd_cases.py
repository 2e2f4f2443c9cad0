"""DeepSpeed where it is unusual: experts, sequence parallelism, what is refused, moved attributes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_spd import SPDConfig, attach
from sharded_spd.errors import AnchorError, BindingError, UnsupportedError
from tests.parity.cases import SPD, gradients, tensors
from tests.parity.zero_cases import drawn
from tests.reference.oracle import BaseOracle, LayerOptions, Oracle
from tests.support.compare import assert_float32_parity, assert_layers_close
from tests.support.engines import Engine
from tests.support.refusals import refused
from tests.support.training import anchor_file, config_of
from tests.support.zero import OFFLOAD, Setting, ZeroTraining, set_up

STRONG = LayerOptions(lr=0.05, weight_decay=1.5)


def follow_what_arrives(engine: Any, inputs: Callable[[int], Tensor], steps: int) -> int:
    """Trains on real losses; the oracle gets the gradients and masters that DeepSpeed's accessors show.

    How often a layer was pulled.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    named = dict(engine.module.named_parameters())
    start = {name: safe_get_full_fp32_param(p).detach().clone() for name, p in named.items()}
    projector = attach(engine, config=SPDConfig(weight_decay=STRONG.weight_decay))
    oracle = BaseOracle(
        start, start, STRONG, lambda params: torch.optim.AdamW(params.values(), lr=0.05, weight_decay=0)
    )
    pulled = 0
    for t in range(steps):
        engine.backward(engine(inputs(t)))
        grads = {name: safe_get_full_grad(p).detach().clone() for name, p in named.items()}
        engine.step()
        pulled += sum(one.s != 0 for one in oracle.step(grads).values())
    got = {name: safe_get_full_fp32_param(p).detach().clone() for name, p in named.items()}
    assert_layers_close(got, oracle.weights, relative=5e-6)
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, (projector.fingerprint, projector.num_steps))
    assert counts == [(projector.fingerprint, steps)] * len(counts)
    layers = set(projector.metrics()["layers"])
    assert len(layers) == len(named)
    projector.detach()
    engine.destroy()
    return pulled


class _Expert(nn.Module):
    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.inner, self.moe, self.head = nn.Linear(7, 8), moe, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _, _ = self.moe(self.inner(x))
        return self.head(hidden).square().mean()


def experts(engine: Engine, *, stage: int) -> None:
    """An expert's layers are summed over the ranks that share it, under names that no other expert has."""
    deepspeed = set_up()
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    torch.manual_seed(engine.rank)  # the experts of other ranks differ
    expert = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 8))
    model = _Expert(MoE(8, expert, num_experts=4, ep_size=2, k=1))
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "dense"}
    )
    made, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(groups, lr=0.05, weight_decay=0.0),
        config=Setting(stage=stage).config(),
    )
    probe = attach(made)
    names: list[Any] = [None] * engine.world
    dist.all_gather_object(names, sorted(n for n in probe.export_anchors() if "deepspeed_experts" in n))
    assert names[0] == names[2]
    assert not set(names[0]) & set(names[1]), "two experts share a name"
    probe.detach()

    def inputs(t: int) -> Tensor:
        generator = torch.Generator().manual_seed(10 * t + engine.rank)
        return torch.randn(12, 7, generator=generator)

    pulled = torch.tensor(follow_what_arrives(made, inputs, 8))
    dist.all_reduce(pulled)
    assert pulled > 0


def sequence_parallel(engine: Engine, *, stage: int) -> None:
    """With a mesh of data and sequence ranks each flat is summed over the ranks that split it."""
    deepspeed = set_up()
    torch.manual_seed(0)

    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square().mean()

    model = Net(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5))
    made, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0),
        config=Setting(stage=stage).config(),
        mesh_param=(2, 2),
    )
    groups = attach(made)
    sizes = {scope.group.size() for scope in groups._adapter.layout().scopes}
    assert sizes == ({4} if stage == 3 else {2}), sizes
    groups.detach()

    def inputs(t: int) -> Tensor:
        # The ranks of one sequence see the same samples here, so that replicas stay equal.
        generator = torch.Generator().manual_seed(10 * t + engine.rank // 2)
        return torch.randn(6, 7, generator=generator) * (1 if t % 2 else -1)

    assert follow_what_arrives(made, inputs, 8) > 0


def nvme(engine: Engine, *, file: bool) -> None:
    """Partitions that are on disk at rest: bound from the model's own weights, or from a file."""
    shapes = {"a": (1100, 1024), "b": (1024, 1001), "c": (37, 3)}
    start = tensors(shapes, dtype=torch.float32)
    other = tensors(shapes, dtype=torch.float32, seed=7) if file else start
    place = {"device": "nvme", "nvme_path": str(engine.scratch), "buffer_count": 4, "pin_memory": False}
    setting = Setting(stage=3, zero={"sub_group_size": 1_100_000, "offload_optimizer": place})
    anchor = anchor_file(engine, other) if file else "snapshot"
    training = ZeroTraining(start, SPD, setting, config=config_of(dict.fromkeys(start, SPD), anchor))
    flats = training.engine.optimizer.fp32_partitioned_groups_flat
    assert any(flat.numel() == 0 for flat in flats), "nothing is on disk"
    oracle, pulled = Oracle(start, other, SPD), 0
    for given in gradients(start, 6):
        training.step(given)
        pulled += sum(one.s != 0 for one in oracle.step(given).values())
    assert pulled >= 3
    got = {}
    import deepspeed

    for name, p in training.engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p]):
            got[name] = p.detach().clone()
    assert_float32_parity(got, oracle.weights, start)
    training.projector.detach()
    refused(
        engine,
        lambda: attach(training.engine, config=SPDConfig(reduction="per_step")),
        (UnsupportedError,),
        "NVMe",
    )
    training.engine.destroy()


def refusals(engine: Engine) -> None:
    """One sentence on every rank, for each setting that cannot be right."""
    start = tensors(dtype=torch.float32)

    def refuses(setting: Setting, pattern: str, *forced: tuple[str, str, Any]) -> None:
        training = ZeroTraining(start, SPD, setting, attached=False)
        zero = training.engine._config.zero_config
        for block, key, value in forced:
            _force(zero if block == "zero" else zero.offload_optimizer, key, value)
        config = SPDConfig(reduction="per_step")
        refused(engine, lambda: attach(training.engine, config=config), (UnsupportedError,), pattern)
        training.engine.destroy()

    refuses(Setting(stage=0, dtype="fp16"), "fp16 at ZeRO stage 0")
    refuses(Setting(stage=1, zero={"elastic_checkpoint": True}), "elastic_checkpoint")
    offload = Setting(stage=2, zero=OFFLOAD)
    refuses(offload, "ratio 0.5", ("offload", "ratio", 0.5))
    refuses(offload, "SuperOffload", ("offload", "super_offload", True))
    refuses(offload, "ZenFlow", ("zero", "zenflow", object()))
    refuses(Setting(stage=3, zero=OFFLOAD), "swapped out", ("offload", "device", "nvme"))
    training = ZeroTraining(start, SPD, Setting(stage=1), attached=False)
    next(training.engine.module.parameters()).tensor_model_parallel = True
    refused(engine, lambda: attach(training.engine), (UnsupportedError,), "tensor parallelism")
    training.engine.destroy()


def _force(block: Any, key: str, value: Any) -> None:
    """A setting under which the engine itself could not be made on this machine."""
    object.__setattr__(block, key, value)


def autocast(engine: Engine) -> None:
    """DeepSpeed's autocast leaves its mark on the process, so this case has a launch of its own."""
    start = tensors(dtype=torch.float32)
    setting = Setting(stage=1, top={"torch_autocast": {"enabled": True, "dtype": "float16"}})
    training = ZeroTraining(start, SPD, setting, attached=False)
    refused(engine, lambda: attach(training.engine), (UnsupportedError,), "torch_autocast with float16")


def wrong_targets(engine: Engine) -> None:
    """Only the engine knows what lies where."""
    for stage in (1, 3):
        training = ZeroTraining(tensors(dtype=torch.float32), SPD, Setting(stage=stage))
        made, base = training.engine, training.base
        refused(
            engine, lambda made=made: attach(made), (UnsupportedError,), "already has a projector attached"
        )
        training.projector.detach()
        refused(engine, lambda made=made: attach(made.optimizer), (UnsupportedError,), "DeepSpeed engine")
        refused(engine, lambda base=base: attach(base), (UnsupportedError,), r"attach\(engine\)")
        attach(made).detach()
        assert not any(key.startswith("spd_") for group in base.param_groups for key in group)
        made.destroy()


def late_weights(engine: Engine, *, setting: Setting) -> None:
    """Weights that are loaded into the model after the engine was made, on one rank or on all."""
    start = tensors(dtype=torch.float32)
    for everywhere in (False, True):
        training = ZeroTraining(start, SPD, setting)
        training.projector.detach()
        if everywhere or engine.rank == 0:
            master = training.engine.optimizer
            flats = getattr(master, "fp32_partitioned_groups_flat", None)
            flat = (flats or master.single_partition_of_fp32_groups)[0]
            flat.data[:3] += 1.0
        made = training.engine
        refused(engine, lambda made=made: attach(made), (UnsupportedError,), "loaded into the model after")
        made.destroy()
    training = ZeroTraining(start, SPD, setting)
    flats = training.projector._adapter._flats
    for flat in flats:
        flat.tensor.data.add_(0.5)
    given = drawn(setting, 1)[0]
    refused(engine, lambda: training.step(given), (AnchorError,), "before the first step")
    refused(engine, lambda: training.step(given), (AnchorError,), "before the first step")
    training.close()


def moved_attributes(engine: Engine, *, stage: int) -> None:
    """Another DeepSpeed, laid out otherwise: an error that names it, never another map."""
    wrong: dict[str, Callable[[Any], None]]
    if stage == 3:
        wrong = {
            "has no grad_position": lambda w: delattr(w, "grad_position"),
            "is said to lie at": lambda w: w.grad_position.update(
                {key: [0, 1, 1] for key in w.grad_position}
            ),
            "master weights are not": lambda w: w.fp32_partitioned_groups_flat.reverse(),
        }
    else:
        wrong = {
            "has no bit16_groups": lambda w: delattr(w, "bit16_groups"),
            "is not among the model's": lambda w: w.bit16_groups[0].append(nn.Parameter(torch.zeros(2))),
            "elements, its master": lambda w: w.single_partition_of_fp32_groups.__setitem__(
                0, torch.zeros(3)
            ),
        }
    two = {name: SPD if "block" in name else replace(SPD, lr=0.01) for name in tensors()}
    for pattern, spoil in wrong.items():
        training = ZeroTraining(tensors(dtype=torch.float32), two, Setting(stage=stage))
        training.projector.detach()
        spoil(training.engine.optimizer)
        made = training.engine
        refused(engine, lambda made=made: attach(made), (UnsupportedError,), "DeepSpeed", pattern, "0.16.9")
    training = ZeroTraining(tensors(dtype=torch.float32), SPD, Setting(stage=stage))
    base = training.base
    stranger = torch.zeros(4, requires_grad=True)
    stranger.grad = torch.ones(4)
    base.param_groups[0]["params"] = [stranger]
    refused(engine, base.step, (BindingError,), "did not have when")
