"""A sharded model as safetensors files; each function runs on every rank of a launch."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from sharded_spd.checkpoint import export, export_safetensors
from sharded_spd.errors import CheckpointError
from tests.parity.cases import SPD, gradients, tensors
from tests.parity.zero_cases import GROUPS, drawn, rounded
from tests.support.compare import assert_bits_equal
from tests.support.engines import Engine
from tests.support.older_engines import Fsdp1
from tests.support.refusals import refused
from tests.support.training import Training, config_of
from tests.support.zero import Setting, ZeroTraining


class _Alive:
    """How many gathered tensors there are at once."""

    def __init__(self) -> None:
        self.most, self._known = 0, list[Any]()

    def __call__(self, tensor: Any) -> Tensor:
        whole = self.gather(tensor).clone()
        self._known = [ref for ref in self._known if ref() is not None] + [weakref.ref(whole)]
        self.most = max(self.most, len(self._known))
        return whole

    gather = staticmethod(export._gather)


def exported(engine: Engine) -> None:
    """Every layer once, under the names given, in files of bounded size, one tensor gathered at a time."""
    start = {name: w for name, w in tensors(dtype=engine.dtype).items() if name != "head.weight"}
    training = Training(engine, start, SPD, form="attached", ties={"head.weight": "embed.weight"})
    for given in gradients(start, 2):
        training.step(given)
    alive = _Alive()
    export._gather = alive  # type: ignore[assignment]
    try:
        folder = engine.scratch / "model"
        export_safetensors(training.model, folder, names={"one": "renamed"}, max_shard_bytes=400)
    finally:
        export._gather = alive.gather
    assert 1 <= alive.most <= 2
    want = {("renamed" if name == "one" else name): w for name, w in training.weights().items()}
    if isinstance(engine, Fsdp1):
        want["head.weight"] = want["embed.weight"]
    _check(folder, want, largest=400)
    refused(engine, lambda: export_safetensors(training.model, folder), (CheckpointError,), "holds something")
    blocked = engine.scratch / "file"
    if engine.rank == 0:
        blocked.write_text("in the way")
    dist.barrier()
    refused(
        engine,
        lambda: export_safetensors(training.model, blocked / "model"),
        (CheckpointError,),
        "nothing was exported",
    )


def exported_zero(engine: Engine, *, setting: Setting) -> None:
    """A DeepSpeed engine, in the model's own precision."""
    start = rounded(tensors(dtype=torch.float32), setting)
    training = ZeroTraining(start, GROUPS, setting, config=config_of(GROUPS))
    for given in drawn(setting, 2):
        training.step(given)
    folder = engine.scratch / f"model{setting.stage}"
    export_safetensors(training.engine, folder)
    want = {name: w.to(setting.torch_dtype) for name, w in training.masters().items()}
    _check(folder, want, largest=None)
    training.close()


def _check(folder: Path, want: Mapping[str, Tensor], *, largest: int | None) -> None:
    files = sorted(folder.glob("*.safetensors"))
    found: dict[str, Tensor] = {}
    for file in files:
        own = load_file(file)
        assert not own.keys() & found.keys()
        found.update(own)
        size = sum(t.numel() * t.element_size() for t in own.values())
        assert largest is None or size <= largest or len(own) == 1
    assert_bits_equal(found, want)
    assert found.keys() == want.keys()
    assert (len(files) == 1) == (largest is None)
    if len(files) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert not list(folder.parent.glob(".*"))
