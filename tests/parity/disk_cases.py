"""Anchors on disk give what the same file's do in memory, to the last bit; on every rank of a launch."""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import Shard

from sharded_spd.anchors import MappedAnchor, MappedValues
from sharded_spd.config import AnchorConfig
from sharded_spd.projection.projector import Projector
from tests.parity.cases import RULES, SHAPES, SPD, gradients, tensors
from tests.parity.zero_cases import drawn, rounded
from tests.support.compare import assert_bits_equal
from tests.support.engines import Engine
from tests.support.training import Form, Training, anchor_file, config_of
from tests.support.zero import Setting, ZeroTraining

BY_COLUMNS = {"a.weight": (3, 8), "a.bias": (3,), "b.weight": (5, 4, 2), "b.other": (1, 4)}


def bit_equal(engine: Engine, *, form: Form, columns: bool = False, rules: bool = False) -> None:
    """A bfloat16 checkpoint; `columns` splits the weights by columns, `rules` gives layers their own."""
    if columns:
        engine.options["shard_placement_fn"] = lambda p: Shard(1) if p.ndim > 1 else None
    shapes = BY_COLUMNS if columns else SHAPES
    start = tensors(shapes, dtype=engine.dtype)
    path = anchor_file(engine, {name: w.bfloat16() for name, w in tensors(shapes, seed=3).items()})
    on_disk: Any = AnchorConfig(source=path, device="disk") if form == "attached" else MappedAnchor(path)
    options = RULES if rules else SPD
    memory = Training(engine, start, options, form=form, anchor=path)
    disk = Training(engine, start, options, form=form, anchor=on_disk)
    _held(disk.projector)
    pulled = 0
    for grads in gradients(start, 6):
        memory.step(grads)
        disk.step(grads)
        pulled += sum(layer["s"] != 0 for layer in disk.projector.metrics()["layers"].values())
    assert_bits_equal(disk.weights(), memory.weights())
    _same(disk.projector, memory.projector, pulled)


def bit_equal_zero(engine: Engine, *, setting: Setting) -> None:
    """Flat partitions, of which each holds runs of several layers."""
    start = rounded(tensors(), setting)
    path = anchor_file(engine, {name: w.bfloat16() for name, w in tensors(seed=3).items()})
    runs = []
    for device in ("auto", "disk"):
        anchor = AnchorConfig(source=path, device=device)  # type: ignore[arg-type]
        training = ZeroTraining(start, SPD, setting, config=config_of(dict.fromkeys(start, SPD), anchor))
        if device == "disk":
            _held(training.projector)
        for grads in drawn(setting, 6):
            training.step(grads)
        runs.append((training.masters(), training.projector.metrics()))
        training.close()
    (want, seen), (got, reported) = runs
    assert_bits_equal(got, want)
    assert repr(reported) == repr(seen), (reported, seen)  # repr takes NaN for NaN
    assert seen["activation_rate"] > 0


def _held(projector: Projector) -> None:
    held = [anchor.values for anchor in projector.export_anchors().values()]
    assert held
    assert all(isinstance(values, MappedValues) for values in held), held


def _same(disk: Projector, memory: Projector, pulled: int) -> None:
    assert disk.fingerprint == memory.fingerprint
    assert disk.deviation() == memory.deviation()
    got, want = disk.metrics(), memory.metrics()
    assert repr(got) == repr(want), (got, want)  # repr takes NaN for NaN
    assert pulled >= 3, f"the case pulls only {pulled} times and shows nothing"
