"""A run that is saved, and goes on elsewhere; each function runs on every rank of a launch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from sharded_spd.checkpoint import Checkpoints, Resumed, storage
from sharded_spd.errors import AnchorError, CheckpointError, UnsupportedError
from tests.parity.cases import SPD, gradients, tensors
from tests.reference.oracle import Oracle
from tests.support.compare import assert_bits_equal, assert_float64_parity
from tests.support.engines import Ddp, Engine, Fsdp2
from tests.support.older_engines import Fsdp1
from tests.support.refusals import refused
from tests.support.training import Form, Training


class _Run:
    """A training with its schedule, and its checkpoints."""

    def __init__(
        self, engine: Engine, start: Mapping[str, Tensor], *, form: Form = "attached", **options: Any
    ) -> None:
        self.training = Training(engine, start, SPD, form=form)
        self.schedule = CosineAnnealingLR(self.training.optimizer, 40)
        self.checkpoints = Checkpoints(engine.scratch / "run", **options)

    def step(self, given: Mapping[str, Tensor]) -> None:
        self.training.step(given)
        self.schedule.step()

    def save(self, step: int, extra: Any = None) -> Path:
        t = self.training
        return self.checkpoints.save(
            step, t.model, t.optimizer, projector=t.projector, scheduler=self.schedule, extra=extra
        )

    def load(self, path: Any = "auto") -> Resumed | None:
        t = self.training
        found = self.checkpoints.load(
            t.model, t.optimizer, projector=t.projector, scheduler=self.schedule, path=path
        )
        if found is not None:
            t.steps = found.step
        return found

    def everything(self) -> dict[str, Tensor]:
        """The weights, this rank's moments, and what its generator draws next."""
        state = dict(self.training.weights())
        optim = get_optimizer_state_dict(self.training.model, self.training.optimizer)
        for name, moments in optim["state"].items():
            for key, value in moments.items():
                state[f"{name} {key}"] = _local(value).clone()
        return {**state, "drawn": torch.rand(3)}


def _local(value: Any) -> Tensor:
    if isinstance(value, DTensor):
        return value.to_local()
    if isinstance(value, ShardedTensor):
        shards = value.local_shards()
        return shards[0].tensor if shards else torch.empty(0)
    assert isinstance(value, Tensor)
    return value


def same_ranks(engine: Engine, *, form: Form, asynchronous: bool) -> None:
    """At the same number of ranks, bit for bit over twenty further steps; a save changes nothing."""
    start = tensors()
    grads = gradients(start, 26)
    extra = {"position": (3, [1, None]), "ids": torch.arange(4), 7: 0.1}
    first = _Run(engine, start, form=form, asynchronous=asynchronous)
    if engine.world > 1:
        dist.new_group([0])  # so that ranks are in different numbers of groups
    for given in grads[:6]:
        first.step(given)
    torch.rand(engine.rank + 1)
    first.save(6, extra)
    for given in grads[6:]:
        first.step(given)
    want = first.everything()
    first.checkpoints.wait()
    torch.manual_seed(99)

    again = _Run(engine, start, form=form)
    found = again.load()
    assert found is not None
    assert found.step == 6
    assert found.extra["position"] == (3, [1, None])
    assert found.extra[7] == 0.1
    assert torch.equal(found.extra["ids"], torch.arange(4))
    assert again.training.projector.num_steps == 6
    for given in grads[6:]:
        again.step(given)
    assert again.schedule.get_last_lr() == first.schedule.get_last_lr()
    assert_bits_equal(again.everything(), want)


class _Fsdp2Pair(Fsdp2):
    pair: DeviceMesh | None = None

    def mesh(self) -> DeviceMesh:
        assert self.pair is not None
        return self.pair

    @property
    def data_parallel(self) -> tuple[int, int]:
        return dist.get_rank(), 2


class _Fsdp1Pair(Fsdp1):
    @property
    def world(self) -> int:
        return 2


def other_ranks_and_engines(engine: Engine) -> None:
    """4 -> 2 -> 1 -> 4 ranks, FSDP2, FSDP1 and DDP after one another, each from the last one's checkpoint."""
    scratch, start = engine.scratch, tensors()
    pair = {"process_group": dist.new_group([0, 1])}
    halves = _Fsdp2Pair(scratch)
    halves.pair = DeviceMesh("cpu", [0, 1])
    stages: list[tuple[int, Callable[[], Engine]]] = [
        (4, lambda: Fsdp2(scratch)),
        (2, lambda: _Fsdp1Pair(scratch, orig=True, options=pair)),
        (1, lambda: Engine(scratch)),
        (4, lambda: Ddp(scratch)),
        (2, lambda: halves),
        (4, lambda: Fsdp1(scratch, orig=False)),
        (4, lambda: Fsdp2(scratch)),
    ]
    oracle, grads, pulled = Oracle(start, start, SPD), gradients(start, 3 * len(stages)), 0
    for number, (ranks, make) in enumerate(stages):
        group = dist.new_group(list(range(ranks)))
        own = grads[3 * number : 3 * number + 3]
        stats = [oracle.step(given) for given in own]
        pulled += sum(s.s != 0 for step in stats for s in step.values())
        if engine.rank < ranks:
            training = Training(make(), start, SPD, form="attached")
            _go_on(training, Checkpoints(scratch / "run", group=group), own, first=3 * number)
            label = f"stage {number}:"
            assert_float64_parity(training.weights(), oracle.weights, label=label)
        dist.barrier()
    assert pulled >= 10


def _go_on(
    training: Training, checkpoints: Checkpoints, grads: list[dict[str, Tensor]], *, first: int
) -> None:
    live = training.model, training.optimizer
    if first:
        found = checkpoints.load(*live, projector=training.projector)
        assert found is not None
        assert found.step == first
        training.steps = first
    for given in grads:
        training.step(given)
    checkpoints.save(first + len(grads), *live, projector=training.projector)


def refusals(engine: Engine) -> None:
    """What does not fit is named on every rank, and leaves what would have been loaded into as it was."""
    start = tensors()
    run = _Run(engine, start)
    run.step(gradients(start, 1)[0])
    refused(engine, lambda: run.save(1, {"f": [print]}), (CheckpointError,), r"extra/f/0", "builtin")
    path = run.save(1)

    other = {**start, "block.mlp.weight": start["block.mlp.weight"] + 0.5}
    wrong = _Run(engine, other)
    refused(engine, wrong.load, (AnchorError,), r"1 of \d+ layers \(block\.mlp\.weight\): another anchor")
    assert_bits_equal(wrong.training.weights(), other)

    renamed = {("tail.weight" if name == "head.weight" else name): w for name, w in start.items()}
    wrong = _Run(engine, renamed)
    wrong.training.projector.detach()
    t = wrong.training
    refused(
        engine,
        lambda: wrong.checkpoints.load(t.model, t.optimizer),
        (CheckpointError,),
        r"model/tail\.weight: missing",
        r"model/head\.weight: the model has no such tensor",
    )
    for edit, words in ((_cut_short, "bytes, wanted"), (_drop_file, "missing"), (_scramble, "damaged")):
        spoilt = _copy(engine, path, edit)
        again = _Run(engine, start)
        refused(engine, partial(again.load, spoilt), (CheckpointError,), words)
        assert_bits_equal(again.training.weights(), start)
    if engine.world > 1:
        part = dist.new_group([0])
        refused(
            engine,
            lambda: Checkpoints(engine.scratch / "b", asynchronous=True, group=part),
            (UnsupportedError,),
            "all ranks",
        )
    refused(engine, lambda: run.load(engine.scratch / "none"), (CheckpointError,), "none", "complete")


def _copy(engine: Engine, path: Path, edit: Callable[[Path], None]) -> Path:
    to = engine.scratch / edit.__name__
    if engine.rank == 0:
        shutil.copytree(path, to)
        edit(to)
    dist.barrier()
    return to


def _cut_short(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-9])


def _drop_file(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].unlink()


def _scramble(folder: Path) -> None:
    """The size is right."""
    file = folder / "metadata.json"
    file.write_bytes(file.read_bytes().replace(b'"sizes": [', b'"sizes": {'))


def one_rank_cannot_write(engine: Engine, *, asynchronous: bool) -> None:
    """Every rank hears of it, what was there stays, nothing is left of it, and the next save works."""
    start = tensors()
    grads = gradients(start, 3)
    run = _Run(engine, start, asynchronous=asynchronous)
    run.step(grads[0])
    before = run.save(1)
    run.checkpoints.wait()
    run.step(grads[1])
    write = storage._write_items

    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    if engine.rank == engine.world - 1:
        storage._write_items = full

    def save() -> None:
        run.save(2)
        run.checkpoints.wait()

    try:
        refused(engine, save, (CheckpointError,), f"rank {engine.world - 1}", "No space left")
    finally:
        storage._write_items = write
    dist.barrier()
    assert [p.name for p in sorted(before.parent.iterdir())] == [before.name]
    run.step(grads[2])
    run.save(3)
    run.checkpoints.wait()
    assert run.checkpoints.latest() == before.with_name("step-00000003")
