"""Saving, loading, exporting and telemetry that go wrong on one rank; each function runs on every rank."""

from __future__ import annotations

import json
import shutil
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from sharded_spd import AdamSPD, SPDConfig, attach
from sharded_spd.checkpoint import Checkpoints, export, export_safetensors, manager, storage
from sharded_spd.config import TelemetryConfig
from sharded_spd.errors import CheckpointError, ConfigError, UnsupportedError
from tests.parity.cases import SPD, gradients, tensors
from tests.support.engines import Engine
from tests.support.refusals import refused
from tests.support.training import Training

BROKEN = RuntimeError("this rank alone")


def _raise(*args: Any, **kwargs: Any) -> Any:
    raise BROKEN


class _Alone:
    """What an action is given: on the last rank `odd`, on all others `usual`."""

    def __init__(self, engine: Engine) -> None:
        self.odd_one = engine.rank == engine.world - 1

    def __call__(self, odd: Any, usual: Any) -> Any:
        return odd if self.odd_one else usual


class _Consolidated(nn.Linear):
    def consolidate_state_dict(self) -> None:
        """As OSS and ZeroRedundancyOptimizer have."""


class _Schedule:
    def __init__(self, state: Callable[[], Any], load: Callable[[Any], Any] = lambda state: None) -> None:
        self.state_dict, self.load_state_dict = state, load


def one_rank_alone(engine: Engine) -> None:
    """Whatever keeps one rank from saving, loading or exporting is raised on all, and the next call works."""
    start, alone, scratch = tensors(), _Alone(engine), engine.scratch / "alone"
    training = Training(engine, start, SPD, form="attached")
    training.step(gradients(start, 1)[0])
    live: dict[str, Any] = {"optimizer": training.optimizer, "projector": training.projector}
    checkpoints, model = Checkpoints(scratch / "run", keep_last=2), training.model
    good = checkpoints.save(1, model, **live, scheduler=_Schedule(dict))
    save = partial(checkpoints.save, 2)
    load = partial(checkpoints.load, model, **live)

    def raises(action: Callable[[], object], *words: str, kinds: Any = (CheckpointError,)) -> None:
        refused(engine, action, kinds, *words)

    raises(lambda: Checkpoints(scratch / "run", keep_last=alone(0, 3)), "keep_last: got 0")
    raises(lambda: Checkpoints(scratch / "run", keep_last=alone(2, 3)), "keep_last: the ranks differ.* 2")
    raises(lambda: Checkpoints(scratch / alone("one", "other")), "directory: the ranks differ")
    raises(lambda: Checkpoints(scratch / "run", asynchronous=alone(True, False)), "asynchronous: the ranks")
    raises(lambda: checkpoints.save(alone(-1, 2), model, **live), "step: got -1")
    raises(lambda: checkpoints.save(alone(3, 2), model, **live), "step: the ranks differ")
    raises(lambda: save(model, **live, extra=alone(print, 1)), "pickling")
    raises(lambda: save(alone(_Consolidated(1, 1), model)), "form of its own", kinds=(UnsupportedError,))
    raises(lambda: save(model, **live, scheduler=_Schedule(alone(_raise, dict))), "RuntimeError: this rank")
    raises(lambda: save(model, **live, scheduler=alone(_Schedule(dict), None)), "what: the ranks differ")
    raises(lambda: alone(load, partial(save, model, **live))(), "operation: the ranks differ")
    raises(lambda: load(path=alone(good, scratch / "none")), "path: the ranks differ")
    raises(lambda: load(scheduler=_Schedule(dict, alone(_raise, len))), "RuntimeError: this rank")
    raises(lambda: load(path=scratch / "none"), "no complete")
    with pytest.MonkeyPatch.context() as patch:
        if alone.odd_one:
            patch.setattr(training.projector, "state_dict", _raise)
        raises(lambda: save(model, **live), "the projector's state: RuntimeError: this rank")
        raises(load, "the projector's state: RuntimeError: this rank")
    with pytest.MonkeyPatch.context() as patch:
        if alone.odd_one:
            patch.setattr(storage, "_write_items", _raise)
            patch.setattr(storage, "_read", _raise)
            patch.setattr(manager, "set_rng_state", _raise)
        raises(lambda: save(model, **live), f"rank {engine.world - 1}.*this rank alone")
        raises(load, "this rank alone")
    if alone.odd_one:  # as a stale cache of a network file system
        seen = scratch / "seen"
        shutil.copytree(good, seen)
        (seen / "metadata.json").write_text("{")
    with pytest.MonkeyPatch.context() as patch:
        if alone.odd_one:
            patch.setattr("sharded_spd.checkpoint.contents.read_metadata", lambda folder: _seen(seen))
        raises(load, "metadata.json: is damaged")
    assert [path.name for path in (scratch / "run").iterdir()] == [good.name]
    assert load() is not None


def _seen(folder: Path) -> Any:
    return storage.read_metadata(folder)


def background_save_that_cannot_start(engine: Engine) -> None:
    """A thread that one rank cannot start, or a copy that does not fit: no rank's thread waits for it."""
    start, alone = tensors(), _Alone(engine)
    training = Training(engine, start, SPD, form="attached")
    checkpoints = Checkpoints(engine.scratch / "behind", asynchronous=True)
    for name in ("StagedPlanner", "ThreadPoolExecutor"):
        with pytest.MonkeyPatch.context() as patch:
            if alone.odd_one:
                patch.setattr(manager, name, _raise)
            refused(
                engine, lambda: checkpoints.save(1, training.model), (CheckpointError,), "could not start"
            )
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]
    checkpoints.save(1, training.model)
    checkpoints.wait()
    assert checkpoints.latest() is not None


def export_that_one_rank_cannot(engine: Engine) -> None:
    """Arguments that differ, names that are repeated, a tensor that cannot be had, on one rank alone."""
    start, alone, folder = tensors(), _Alone(engine), engine.scratch / "exported"
    model = Training(engine, start, SPD, form="attached").model
    twice = {"one": "same", "head.weight": "same"}

    def raises(*words: str, to: Any = folder, **options: Any) -> None:
        refused(engine, lambda: export_safetensors(model, to, **options), (CheckpointError,), *words)

    raises("names: the ranks differ", names=alone(twice, {}))
    raises("'same' stands for several", names=twice)
    raises("names: wanted FQNs", names=alone({"one": 1}, {}))
    raises("max_shard_bytes: got 0", max_shard_bytes=alone(0, 400))
    raises("directory: the ranks differ", to=alone(folder, folder / "b"))
    raises("export_safetensors: TypeError", to=alone(3, folder))
    gather, calls = export._gather, [0]

    def once(tensor: Any) -> Any:
        whole = gather(tensor)
        calls[0] += 1
        return _raise() if calls[0] == 2 else whole

    for rank in range(engine.world):
        with pytest.MonkeyPatch.context() as patch:
            calls[0] = 0
            if engine.rank == rank:
                patch.setattr(export, "_gather", once)
            raises("nothing was exported.*this rank alone")
    assert not folder.exists()
    assert not [path for path in engine.scratch.iterdir() if path.name.endswith(".part")]
    export_safetensors(model, folder)


def telemetry_of_one_rank(engine: Engine) -> None:
    """One that cannot be opened raises on all ranks, one that cannot be written warns and ends nothing."""
    model = engine.wrap(nn.Linear(4, 4, dtype=engine.dtype))

    def start(path: Path) -> tuple[torch.optim.Optimizer, Any]:
        base = torch.optim.Adam(model.parameters(), lr=0.01)
        config = SPDConfig(telemetry=TelemetryConfig(every=1, path=str(path)))
        return base, attach(base, model, config)

    def step(base: torch.optim.Optimizer) -> None:
        model(torch.ones(2, 4, dtype=engine.dtype)).sum().backward()
        base.step()
        base.zero_grad()

    blocked = engine.scratch / f"file{engine.rank}"
    blocked.write_text("in the way")
    refused(engine, lambda: start(blocked / "t.jsonl"), (ConfigError,), "telemetry.path: .*cannot be opened")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        base, projector = start(Path("/dev/full"))
        for _ in range(3):
            step(base)
    said = [str(w.message) for w in caught if "/dev/full cannot be written (No space left" in str(w.message)]
    assert len(said) == (engine.rank == 0)
    assert projector.num_steps == 3
    base, _ = start(engine.scratch / "t.jsonl")
    base, _ = start(engine.scratch / "t.jsonl")
    step(base)
    dist.barrier()
    assert len((engine.scratch / "t.jsonl").read_text().splitlines()) == 1


def model_on_part_of_the_ranks(engine: Engine) -> None:
    """On ranks 2 and 3 of 4, and on rank 3 alone: their first one writes telemetry and exports."""
    for own in ([0, 1], [2, 3], [3]):
        mesh = DeviceMesh("cpu", own)
        group = dist.new_group(own)
        if engine.rank in own:
            folder = engine.scratch / "-".join(map(str, own))
            model = fully_shard(nn.Linear(4, 4), mesh=mesh)
            base = torch.optim.Adam(model.parameters(), lr=0.01)
            telemetry = TelemetryConfig(every=1, path=str(folder / "t.jsonl"))
            projector = attach(base, model, SPDConfig(telemetry=telemetry))
            for _ in range(2):
                model(torch.ones(2, 4)).sum().backward()
                base.step()
                base.zero_grad()
            dist.barrier(group)
            assert [json.loads(line)["step"] for line in (folder / "t.jsonl").open()] == [1, 2]
            export_safetensors(model, folder / "model")
            export_safetensors(model, folder / "again", group=group)
            assert (folder / "again" / "model.safetensors").is_file()
            saved = Checkpoints(folder / "run", group=group)
            saved.save(2, model, base, projector=projector)
            assert saved.load(model, base, projector=projector) is not None
        elif 0 in own or engine.rank == 0:
            wrong: Any = group
            with pytest.raises(CheckpointError, match="this rank is in"):
                Checkpoints(engine.scratch / "none", group=wrong)
            with pytest.raises(CheckpointError, match="this rank is in"):
                export_safetensors(nn.Linear(1, 1), engine.scratch / "none", group=wrong)
    dist.barrier()


def activation_rate_counts_the_same_layers(engine: Engine, *, shares: bool = False) -> None:
    """All that are trained, used in this step or not, split or not; frozen ones are in few optimizers."""
    start = tensors()
    training = Training(engine, start, SPD, form="attached", frozen=["conv.weight"])
    given = gradients(start, 4, missing={t: ["head.weight", "conv.weight"] for t in range(4)})
    for grads in given:
        training.step(grads)
    found = training.projector.metrics(gather=True)
    assert found["num_layers"] == len(start) - 1
    assert found["layers"].keys() == start.keys() - {"conv.weight"}
    assert found["layers"]["head.weight"]["s"] == 0
    pulled = sum(own["s"] > 0 for own in found["layers"].values())
    assert found["activation_rate"] == pulled / found["num_layers"] > 0
    here = training.projector.metrics()
    assert (here["num_layers"] < found["num_layers"]) == shares


def scaler_skips_a_step(engine: Engine) -> None:
    """A skipped step is no step, on all ranks, though the optimizer is called: it skips by itself."""
    start = {name: w.float() for name, w in tensors().items()}
    model = engine.wrap(nn.ParameterDict({name.replace(".", "_"): w for name, w in start.items()}))
    optimizer = AdamSPD(model.named_parameters(), lr=0.01, weight_decay=1.0, fused=True)
    for t in range(4):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.found_inf = torch.tensor(float(t == 1))  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    assert optimizer.projector.num_steps == 3
