"""Everything that reads what somebody else may have written, and what it may do about bad content.

A reader returns, or raises one of the package's own errors: in time, without unpickling, and without opening
a file outside of the folder that it was given.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from sharded_spd import load_config
from sharded_spd.anchors import FileAnchor
from sharded_spd.anchors.tools.build import add_manifest, verify
from sharded_spd.checkpoint import Checkpoints
from sharded_spd.errors import AnchorError, BindingError, CheckpointError, ConfigError, UnsupportedError
from sharded_spd.finetune.config import load_job
from sharded_spd.sharding.layout import FlatRange, ShardSlice
from tests.fuzz.mutate import damage_bytes, damage_value, to_json

OWN_ERRORS = (AnchorError, BindingError, CheckpointError, ConfigError, UnsupportedError)
SECONDS = 5.0


@dataclass
class Target:
    """A valid file in a folder, the reader of the folder, and the two ways to damage the file."""

    file: Path
    read: Callable[[], object]
    valid: bytes
    parse: Callable[[bytes], Any] | None
    write: Callable[[Any, bytes], bytes]

    def case(self, random: Random) -> bytes:
        """A damaged content; of every two one that gets past the first parser."""
        if self.parse is not None and random.random() < 0.6:
            return self.write(damage_value(self.parse(self.valid), random), self.valid)
        return damage_bytes(self.valid, random)

    def run(self, content: bytes) -> bool:
        """Whether the content was taken; fails for what a reader may not do."""
        self.file.write_bytes(content)
        began = time.monotonic()
        try:
            with _watched(self.file.parent):
                self.read()
        except OWN_ERRORS:
            return False
        finally:
            assert time.monotonic() - began < SECONDS, "it took too long"
        return True


_WATCHED: list[tuple[Path, list[str]]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _WATCHED:
        return
    folder, found = _WATCHED[-1]
    if event == "pickle.find_class":
        found.append(f"unpickles {arguments}")
    if event == "open" and isinstance(arguments[0], str) and not arguments[0].endswith((".py", ".pyc")):
        path = Path(arguments[0])
        if not path.resolve().is_relative_to(folder.resolve()):
            found.append(f"opens {path}")


sys.addaudithook(_hook)


@contextmanager
def _watched(folder: Path) -> Iterator[None]:
    found: list[str] = []
    _WATCHED.append((folder, found))
    try:
        yield
    finally:
        _WATCHED.pop()
        assert not found, found


def _json_target(file: Path, read: Callable[[], object]) -> Target:
    return Target(file, read, file.read_bytes(), json.loads, lambda value, _: to_json(value))


SHAPES = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (2, 4)}


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def _read_anchor(path: Path) -> None:
    store = FileAnchor(path)
    problems = store.problems(SHAPES)
    if problems:
        raise AnchorError(problems[0])
    for name, shape in SHAPES.items():
        store.fetch(ShardSlice(name, 0, torch.Size(shape).numel(), FlatRange(0)))


def header(folder: Path) -> Target:
    """The header of a safetensors file: its length, its JSON, and where the data lies."""
    file = folder / "model.safetensors"
    save_file(_tensors(), file)

    def parse(content: bytes) -> Any:
        length = int.from_bytes(content[:8], "little")
        return json.loads(content[8 : 8 + length])

    def write(value: Any, content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        text = to_json(value)
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return Target(file, lambda: _read_anchor(file), file.read_bytes(), parse, write)


def index(folder: Path) -> Target:
    """The index of a sharded checkpoint."""
    for number, names in enumerate((("a.weight", "a.bias"), ("b.weight",)), start=1):
        save_file({n: _tensors()[n] for n in names}, folder / f"model-{number}.safetensors")
    file = folder / "model.safetensors.index.json"
    weight_map = {"a.weight": "model-1.safetensors", "a.bias": "model-1.safetensors"}
    file.write_bytes(to_json({"weight_map": {**weight_map, "b.weight": "model-2.safetensors"}}))
    return _json_target(file, lambda: _read_anchor(folder))


def manifest(folder: Path) -> Target:
    """The manifest beside an anchor's files, at binding and under the command that verifies it."""
    save_file(_tensors(), folder / "model.safetensors")
    add_manifest(str(folder))

    def read() -> None:
        _read_anchor(folder)
        store = FileAnchor(folder)
        store.problems(SHAPES)
        assert all(store.expected(name) is not None for name in SHAPES)
        store.expected_overall()
        problems = verify(str(folder))
        if problems:
            raise AnchorError(problems[0])

    return _json_target(folder / "anchor.json", read)


def _checkpoint(folder: Path) -> tuple[Path, Callable[[], object]]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoints = Checkpoints(folder)
    extra = {"position": (1, [2, None]), "rate": float("inf"), "raw": b"x", "t": torch.ones(2), 3: 4}
    path = checkpoints.save(1, model, optimizer, scheduler=schedule, extra=extra)
    return path, lambda: checkpoints.load(model, optimizer, scheduler=schedule, path=path)


def metadata(folder: Path) -> Target:
    """What a checkpoint says of its tensors, and the values beside them."""
    path, read = _checkpoint(folder)
    target = _json_target(path / "metadata.json", read)
    marker = path / "complete.json"

    def honest() -> None:
        # The marker knows the size; a hostile writer would have made it fit.
        content = json.loads(marker.read_bytes())
        content["files"]["metadata.json"] = target.file.stat().st_size
        marker.write_bytes(to_json(content))
        read()

    target.read = honest
    return target


def marker(folder: Path) -> Target:
    """A checkpoint's list of files."""
    path, read = _checkpoint(folder)
    return _json_target(path / "complete.json", read)


def part(folder: Path) -> Target:
    """A rank's file of a checkpoint."""
    path, read = _checkpoint(folder)
    file = path / "rank00000.safetensors"
    own = header(folder)
    return Target(file, read, file.read_bytes(), own.parse, own.write)


CONFIG = """
rule: spd
weight_decay: 1.5
max_pull: 1.0
anchor: {source: snapshot, dtype: float32, device: cpu}
anchor_missing: zero
layers:
  - {pattern: "head.*", rule: decay, weight_decay: 0.01}
  - {pattern: ".*lora_.*", anchor: zero, max_pull: 2}
telemetry: {every: 10}
"""
JOB = """
checkpoint: here
data: {name: digits, train: 50}
engine: {name: fsdp2, param_dtype: bfloat16}
ranks: 2
seeds: [0, 1]
compare: [adamw, spd]
train: {epochs: 3, batch_size: 8, lr: 1.0e-3, betas: [0.9, 0.99], schedule: cosine}
spd: {weight_decay: 2.0, layers: [{pattern: "a.*", rule: none}]}
select: {weight_decay: {spd: [1.0, 2.0]}}
checkpointing: {every: 10, keep_last: 2}
"""


def _yaml_target(file: Path, text: str, read: Callable[[], object]) -> Target:
    def write(value: Any, _: bytes) -> bytes:
        return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")

    return Target(file, read, text.encode(), yaml.safe_load, write)


def config(folder: Path) -> Target:
    """The configuration of the projection."""
    file = folder / "spd.yaml"
    return _yaml_target(file, CONFIG, lambda: load_config(file))


def job(folder: Path) -> Target:
    """The configuration of the fine-tuning job."""
    file = folder / "job.yaml"
    return _yaml_target(file, JOB, lambda: load_job(file))


TARGETS: dict[str, Callable[[Path], Target]] = {
    made.__name__: made for made in (config, job, header, index, manifest, metadata, marker, part)
}
