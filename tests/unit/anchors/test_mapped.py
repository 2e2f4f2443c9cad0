"""Anchors that stay on disk: chunks of the map against the tensor, files that change, what is let go."""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from sharded_spd import AdamSPD, SPDConfig, attach, load_config
from sharded_spd.anchors import FileAnchor, MappedAnchor, MappedValues
from sharded_spd.anchors.base import Values
from sharded_spd.anchors.mapped import gather
from sharded_spd.config import AnchorConfig
from sharded_spd.errors import AnchorError, ConfigError
from sharded_spd.safetensors_io.reader import read_header
from sharded_spd.sharding.layout import Box, FlatRange, ShardSlice
from tests.support.local import LAMBDA, LR, SHAPES, give, gradients, layers, parameters, values
from tests.support.models import Probe

FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write(path: Path, tensors: Mapping[str, Tensor], askew: int) -> None:
    """A safetensors file whose data begins at `askew` modulo 8: the library's own are aligned."""
    header, begin = {}, 0
    for name, t in tensors.items():
        end = begin + t.numel() * t.itemsize
        shape = list(t.shape)
        header[name] = {"dtype": FLOATS[t.dtype], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * ((askew - 8 - len(text)) % 8)
    data = b"".join(bytes(t.contiguous().view(-1).view(torch.uint8).tolist()) for t in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@st.composite
def cases(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    stored = draw(st.sampled_from(list(FLOATS)))
    wanted = draw(st.sampled_from([None, torch.float32, torch.bfloat16]))
    whole = torch.arange(math.prod(shape), dtype=torch.float64).sub(7).div(3).to(stored).view(shape)
    if draw(st.booleans()):
        begin, end = sorted(draw(st.tuples(*[st.integers(0, whole.numel())] * 2)))
        region: FlatRange | Box = FlatRange(begin)
        part = whole.reshape(-1)[begin:end]
    else:
        edges = [sorted(draw(st.tuples(*[st.integers(0, n)] * 2))) for n in shape]
        region = Box(tuple(a for a, _ in edges), tuple(b - a for a, b in edges))
        part = whole[tuple(slice(a, b) for a, b in edges)]
    return whole, region, part.reshape(-1), wanted, draw(st.integers(0, 7))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases(), st.data())
def test_any_chunk_of_any_region(tmp_path: Path, case, data) -> None:
    """Against slicing the whole tensor, in every dtype and at every offset in the file."""
    whole, region, part, wanted, askew = case
    path = tmp_path / "model.safetensors"
    path.unlink(missing_ok=True)
    write(path, {"other": torch.zeros(1, dtype=torch.float64), "w": whole}, askew)
    tensor = read_header(str(path))["w"]
    assert tensor.begin % 8 == askew
    got = MappedValues(tensor, region, part.numel(), wanted)
    want = part if wanted is None else part.to(wanted)
    assert got.numel() == part.numel()
    assert got.dtype == want.dtype
    begin, end = (data.draw(st.integers(0, part.numel() + 2)) for _ in range(2))
    for cut in (slice(begin, end), slice(None), slice(begin, None)):
        chunk = got[cut]
        assert chunk.dim() == 1
        assert chunk.dtype == want.dtype
        assert chunk.numel() == 0 or chunk.data_ptr() % chunk.itemsize == 0
        assert torch.equal(chunk, want[cut])


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """The elements that operations with a result of their own make."""

    def __init__(self) -> None:
        super().__init__()
        self.copied = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        shared = func.is_view or func is torch.ops.aten._unsafe_view.default
        if isinstance(result, Tensor) and not shared:
            self.copied += result.numel()
        return result


@pytest.mark.parametrize(
    ("region", "numel", "copied"),
    [
        (FlatRange(100), 6000, 0),  # a view of the file
        (Box((1, 0, 0), (2, 60, 50)), 6000, 0),
        (Box((0, 10, 0), (4, 30, 50)), 6000, 1000),
        (Box((0, 0, 20), (4, 60, 25)), 6000, 1500),
    ],
)
def test_a_chunk_costs_no_more_than_itself(tmp_path: Path, region, numel: int, copied: int) -> None:
    """A chunk of 500 elements, which may be put together of parts: at most its size for each dim."""
    save_file({"w": torch.arange(12000, dtype=torch.float32).view(4, 60, 50)}, tmp_path / "m.safetensors")
    got = MappedAnchor(tmp_path / "m.safetensors").fetch(ShardSlice("w", 0, numel, region))
    want = FileAnchor(tmp_path / "m.safetensors").fetch(ShardSlice("w", 0, numel, region))
    with Counted() as counted:
        chunk = got[1333:1833]
    assert counted.copied <= copied
    assert torch.equal(chunk, want[1333:1833])


def test_gather_of_nothing_at_the_end() -> None:
    part = torch.arange(24).view(4, 6)[:, 1:4]
    assert gather(part, 12, 12).numel() == 0
    assert gather(part, 3, 3).numel() == 0


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "base.safetensors"
    save_file({name: w.bfloat16() for name, w in layers(seed=3).items()}, path)
    return path


def config(path: Path, device: str, **layer: object) -> SPDConfig:
    settings = {"weight_decay": LAMBDA, "anchor": {"source": str(path), "device": device}}
    return load_config({**settings, "layers": [layer] if layer else []})


def trained(path: Path, device: str, *, frozen: str = "", rule: str = "spd", steps: int = 6):
    model = Probe(layers())
    params = dict(model.named_parameters())
    for name, p in params.items():
        p.requires_grad_(name != frozen)
    optimizer = torch.optim.Adam(params.values(), lr=LR)
    own = {"pattern": ".*", "rule": rule}
    projector = attach(optimizer, model, config(path, device, **own))
    for t, grads in enumerate(gradients(steps)):
        if t == 2 and frozen:
            params[frozen].requires_grad_(True)
        give(params, {n: g for n, g in grads.items() if params[n].requires_grad})
        optimizer.step()
    return projector, optimizer, params


@pytest.mark.parametrize("rule", ["spd", "l2sp"])
@pytest.mark.parametrize("frozen", ["", "body.weight"])
def test_bit_equal_to_memory(checkpoint: Path, rule: str, frozen: str) -> None:
    disk, _, got = trained(checkpoint, "disk", rule=rule, frozen=frozen)
    memory, _, want = trained(checkpoint, "auto", rule=rule, frozen=frozen)
    for name, w in values(want).items():
        assert torch.equal(got[name], w), name
    assert disk.fingerprint == memory.fingerprint
    assert disk.deviation() == memory.deviation()
    assert disk.metrics()["layers"] == memory.metrics()["layers"]
    assert all(isinstance(held.values, MappedValues) for held in disk.export_anchors().values())


def test_frozen_at_its_anchor_is_held_too(tmp_path: Path) -> None:
    """Mapped values need no memory, so there is nothing to put off, and nothing to guard."""
    save_file(layers(), tmp_path / "start.safetensors")
    projector, _, _ = trained(tmp_path / "start.safetensors", "disk", frozen="body.weight", steps=1)
    assert not projector.export_anchors()["body.weight"].pending


def test_adam_spd_takes_the_store(checkpoint: Path) -> None:
    params = parameters(layers())
    optimizer = AdamSPD(params.items(), lr=LR, weight_decay=LAMBDA, anchor=MappedAnchor(checkpoint))
    want = parameters(layers())
    reference = AdamSPD(want.items(), lr=LR, weight_decay=LAMBDA, anchor=checkpoint)
    twin = copy.deepcopy(optimizer)
    held, own = twin.projector.export_anchors(), optimizer.projector.export_anchors()
    assert all(held[name].values is own[name].values for name in SHAPES)
    loaded = pickle.loads(pickle.dumps(optimizer))
    assert loaded.projector.fingerprint == optimizer.projector.fingerprint
    copied = {p_name: p for p_name, p in zip(params, loaded.param_groups[0]["params"], strict=True)}
    for grads in gradients(5):
        for its, step in ((params, optimizer), (want, reference), (copied, loaded)):
            give(its, grads)
            step.step()
    for name in params:
        assert torch.equal(params[name], want[name])
        assert torch.equal(copied[name], want[name])


def maps_of(path: Path) -> int:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    return sum(str(path) in line for line in maps.read_text().splitlines())


def descriptors_of(path: Path) -> int:
    found = 0
    for fd in Path("/proc/self/fd").iterdir():
        try:
            found += os.readlink(fd) == str(path)
        except OSError:  # the listing's own
            continue
    return found


def test_one_map_per_file_which_goes_with_the_binding(checkpoint: Path) -> None:
    projector, optimizer, _ = trained(checkpoint, "disk")
    second, *_ = trained(checkpoint, "disk", steps=1)
    assert maps_of(checkpoint) == 1
    assert descriptors_of(checkpoint) <= 2  # the map's and that of the file
    second.detach()
    projector.detach()
    gc.collect()
    assert maps_of(checkpoint) == 0
    assert descriptors_of(checkpoint) == 0
    assert optimizer.state


@pytest.mark.parametrize("damage", ["truncated", "written", "longer"])
@pytest.mark.parametrize("rule", ["spd", "l2sp"])
def test_a_file_that_changes_in_use(checkpoint: Path, damage: str, rule: str) -> None:
    """Raised before the pages are touched, and at every step from then on."""
    projector, optimizer, params = trained(checkpoint, "disk", rule=rule)
    size = checkpoint.stat().st_size
    if damage == "truncated":
        os.truncate(checkpoint, 10)
    else:
        with open(checkpoint, "r+b") as file:
            file.seek(-4 if damage == "written" else 0, os.SEEK_END)
            file.write(b"\1\1\1\1")
        os.utime(checkpoint, ns=(1, 1))  # clocks of file systems are coarse
    for _ in range(2):
        give(params, gradients(1)[0])
        with pytest.raises(
            AnchorError, match=r"layer 'embed.weight'.*base\.safetensors: has changed"
        ) as info:
            optimizer.step()
    if damage != "written":
        assert f"{size} bytes long then, {checkpoint.stat().st_size} now" in str(info.value)
    with pytest.raises(AnchorError, match="has changed"):
        projector.deviation()
    with pytest.raises(AnchorError, match="has changed"):
        projector.bind()


def test_another_file_of_the_name_leaves_the_bound_one_alone(checkpoint: Path) -> None:
    """Files are commonly replaced by renaming: what is mapped is still there."""
    _, optimizer, params = trained(checkpoint, "disk")
    _, other, expected = trained(checkpoint, "auto")
    save_file({"x": torch.zeros(1)}, checkpoint.with_suffix(".new"))
    os.replace(checkpoint.with_suffix(".new"), checkpoint)
    for its, step in ((params, optimizer), (expected, other)):
        give(its, gradients(1)[0])
        step.step()
    assert all(torch.equal(params[name], expected[name]) for name in params)


def test_a_change_between_header_and_map(checkpoint: Path) -> None:
    store = MappedAnchor(checkpoint)
    assert store.problems(SHAPES) == []
    os.truncate(checkpoint, 200)
    with pytest.raises(AnchorError, match="changed while it was in use"):
        store.fetch(ShardSlice("norm.weight", 0, 1, FlatRange(0)))
    os.unlink(checkpoint)
    with pytest.raises(AnchorError, match=r"base\.safetensors: cannot be read"):
        store.fetch(ShardSlice("norm.weight", 0, 1, FlatRange(0)))


@pytest.mark.parametrize("source", ["snapshot", "deferred", FileAnchor("x")])
def test_what_has_no_file_is_refused(source: object) -> None:
    with pytest.raises(ConfigError, match=r"^anchor\.device: disk .*checkpoint, or say device: cpu"):
        load_config({"anchor": {"source": source, "device": "disk"}})


def test_what_may_be_on_disk() -> None:
    for source in ("zero", "/models/base", MappedAnchor("x")):
        assert AnchorConfig(source=source, device="disk").device == "disk"
    model = Probe(layers())
    zero = SPDConfig(anchor=AnchorConfig(source="zero", device="disk"))
    projector = attach(torch.optim.Adam(model.parameters()), model, zero)
    assert projector.export_anchors()["norm.weight"].values is None


def test_mapping_warns_of_nothing(checkpoint: Path) -> None:
    """In a process of its own, for torch warns once of memory that cannot be written to."""
    code = (
        "from sharded_spd.anchors import MappedAnchor; from sharded_spd.sharding.layout import *; "
        f"print(MappedAnchor({str(checkpoint)!r}).fetch(ShardSlice('norm.weight', 0, 1, FlatRange(0)))[:])"
    )
    command = [sys.executable, "-W", "error:The given buffer:UserWarning", "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("tensor("), done.stderr
    assert "not writable" not in done.stderr


def test_a_tensor_is_such_values_too() -> None:
    stands: Values = torch.arange(5)
    assert stands[1:3].tolist() == [1, 2]
