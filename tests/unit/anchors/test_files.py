"""Anchors read from safetensors files: values, names, bounds, and every kind of damage."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import struct
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sharded_spd.anchors import casting
from sharded_spd.anchors.base import AnchorStore
from sharded_spd.anchors.files import FileAnchor
from sharded_spd.anchors.fingerprint import slice_fingerprint
from sharded_spd.errors import AnchorError
from sharded_spd.safetensors_io import reader
from sharded_spd.sharding.layout import Box, FlatRange, ShardSlice

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float64).sub(3).reshape(shape).to(dtype)


def flat(layer: str, start: int, numel: int) -> ShardSlice:
    return ShardSlice(layer=layer, offset=0, numel=numel, region=FlatRange(start))


def box(layer: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> ShardSlice:
    return ShardSlice(layer=layer, offset=0, numel=math.prod(sizes), region=Box(offsets, sizes))


def whole(layer: str, tensor: torch.Tensor) -> ShardSlice:
    return flat(layer, 0, tensor.numel())


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in tensors.items()}


def assert_same(got: torch.Tensor | None, want: torch.Tensor) -> None:
    # Reading moves bits and nothing else: no tolerance.
    torch.testing.assert_close(got, want.reshape(-1), rtol=0, atol=0)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {"a.weight": values(5, 3), "a.bias": values(5), "b.weight": values(2, 3, 4), "b.scale": values()}


@pytest.fixture
def single(tmp_path, tensors) -> Path:
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def save_sharded(root: Path, tensors: dict[str, torch.Tensor], name: str = "model") -> Path:
    weight_map = {}
    for number, (key, tensor) in enumerate(tensors.items(), 1):
        file = f"{name}-{number:05}-of-{len(tensors):05}.safetensors"
        save_file({key: tensor}, root / file)
        weight_map[key] = file
    index = root / f"{name}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


# --- values ---


@st.composite
def tensor_and_region(draw):
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    tensor = values(*shape, dtype=draw(st.sampled_from(FLOATS)))
    if draw(st.booleans()):
        start = draw(st.integers(0, tensor.numel()))
        numel = draw(st.integers(0, tensor.numel() - start))
        return tensor, flat("x", start, numel), tensor.reshape(-1)[start : start + numel]
    offsets = tuple(draw(st.integers(0, size)) for size in shape)
    sizes = tuple(draw(st.integers(0, size - offset)) for size, offset in zip(shape, offsets, strict=True))
    cut = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
    return tensor, box("x", offsets, sizes), cut


@settings(max_examples=300, deadline=None)
@given(tensor_and_region(), st.sampled_from([(8, 8), (64, 8), (64, 24), (4 << 20, 64 << 10)]))
def test_any_region_of_any_tensor(tmp_path_factory, case, limits):
    """Brute force: slicing the whole tensor. Tiny limits send small tensors down every path of the reader."""
    tensor, piece, want = case
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    save_file({"x": tensor}, path)
    chunk, read_through = limits
    with mock.patch.multiple(reader, _CHUNK_BYTES=chunk, _READ_THROUGH_BYTES=read_through):
        got = FileAnchor(path).fetch(piece)
        as_float = FileAnchor(path, dtype="float32").fetch(piece)
    assert got.dtype == tensor.dtype
    assert_same(got, want)
    assert_same(as_float, want.float())


@settings(max_examples=200, deadline=None)
@given(tensor_and_region(), st.sampled_from([1, 2, 5, 64]))
def test_any_region_in_a_dtype_that_may_lose(tmp_path_factory, case, limit):
    """It is read in parts, whose fingerprints before the cast add up to the whole region's."""
    tensor, piece, want = case
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    save_file({"x": tensor}, path)
    store = FileAnchor(path, dtype="float16")
    with mock.patch.object(casting, "_CHUNK", limit):
        assert_same(store.fetch(piece), want.half())
    cast = store.cast("x")
    assert (cast is None) == (tensor.dtype == torch.float16)
    if cast is not None:
        own = slice_fingerprint(want.reshape(-1), piece, tuple(tensor.shape))
        assert (cast.fingerprint, cast.worst) == (tuple(own.tolist()), 0.0)


def test_all_layouts_hold_the_same(tmp_path, tensors, single):
    directory = tmp_path / "one"
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    index = save_sharded(sharded, tensors)
    united = tmp_path / "united"
    united.mkdir()
    for number, (key, tensor) in enumerate(tensors.items()):
        save_file({key: tensor}, united / f"part{number}.safetensors")
    for path in (single, str(single), directory, sharded, index, united):
        anchor = FileAnchor(path)
        assert isinstance(anchor, AnchorStore)
        assert anchor.source == str(path)
        assert anchor.problems(shapes(tensors)) == []
        for name, tensor in tensors.items():
            assert_same(anchor.fetch(whole(name, tensor)), tensor)


def test_index_wins_over_other_files_beside_it(tmp_path, tensors):
    save_sharded(tmp_path, tensors)
    save_file({name: t + 1 for name, t in tensors.items()}, tmp_path / "consolidated.safetensors")
    assert_same(FileAnchor(tmp_path).fetch(whole("a.bias", tensors["a.bias"])), tensors["a.bias"])


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize(
    ("asked", "wanted"), [("auto", None), ("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_dtype(tmp_path, stored, asked, wanted):
    tensor = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(stored)
    save_file({"x": tensor}, tmp_path / "m.safetensors")
    got = FileAnchor(tmp_path, dtype=asked).fetch(flat("x", 3, 20))
    assert got.dtype == (wanted or stored)
    assert_same(got, tensor.reshape(-1)[3:23].to(wanted or stored))


def test_result_is_fresh_memory_and_outlives_the_file(single, tensors):
    anchor = FileAnchor(single)
    first = anchor.fetch(whole("a.weight", tensors["a.weight"]))
    second = anchor.fetch(whole("a.weight", tensors["a.weight"]))
    assert first.untyped_storage().nbytes() == first.numel() * first.element_size()
    assert first.data_ptr() != second.data_ptr()
    first.zero_()
    single.unlink()
    assert_same(second, tensors["a.weight"])


def test_empty_slices(single, tensors):
    anchor = FileAnchor(single)
    for piece in (flat("a.weight", 15, 0), box("a.weight", (5, 0), (0, 3)), box("a.weight", (0, 3), (5, 0))):
        got = anchor.fetch(piece)
        assert got.shape == (0,)
        assert got.dtype == torch.float32


@pytest.mark.parametrize(
    "piece",
    [
        flat("a.weight", 10, 6),
        flat("a.weight", -1, 2),
        box("a.weight", (4, 0), (2, 3)),
        box("a.weight", (0,), (5,)),
        ShardSlice("a.weight", 0, 5, Box((0, 0), (2, 3))),
    ],
)
def test_region_outside_the_tensor(single, piece):
    with pytest.raises(AnchorError, match=r"^a\.weight: .*not within 'a\.weight' of shape \[5, 3\]"):
        FileAnchor(single).fetch(piece)


def test_no_file_stays_open(tmp_path, tensors):
    index = save_sharded(tmp_path, tensors)
    before = sorted(os.listdir("/proc/self/fd"))
    anchor = FileAnchor(index)
    anchor.problems(shapes(tensors))
    for _ in range(50):
        for name, tensor in tensors.items():
            anchor.fetch(whole(name, tensor))
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_copies_and_stays_usable(single, tensors):
    anchor = FileAnchor(single)
    anchor.problems(shapes(tensors))
    assert_same(copy.deepcopy(anchor).fetch(whole("b.weight", tensors["b.weight"])), tensors["b.weight"])


# --- names ---


def test_wrapped_names_are_found(single, tensors):
    wanted = {f"module._orig_mod.{name}": shape for name, shape in shapes(tensors).items()}
    anchor = FileAnchor(single)
    assert anchor.problems(wanted) == []
    assert_same(anchor.fetch(flat("module._orig_mod.a.bias", 1, 3)), tensors["a.bias"][1:4])


def test_base_model_prefix_is_settled_over_all_layers(single, tensors):
    wanted = {f"vit.{name}": shape for name, shape in shapes(tensors).items()}
    anchor = FileAnchor(single)
    assert anchor.problems(wanted) == []
    assert_same(anchor.fetch(flat("vit.a.bias", 0, 5)), tensors["a.bias"])


def test_fetch_without_problems_first(single, tensors):
    assert_same(FileAnchor(single).fetch(flat("_orig_mod.a.bias", 0, 5)), tensors["a.bias"])


def test_ambiguous_names_are_a_problem(tmp_path):
    save_file({"_orig_mod.w": values(2), "_fpw_module.w": values(2)}, tmp_path / "m.safetensors")
    (problem,) = FileAnchor(tmp_path).problems({"w": (2,)})
    assert problem.startswith("w: could be any of _fpw_module.w, _orig_mod.w")
    with pytest.raises(AnchorError, match="could be any of"):
        FileAnchor(tmp_path).fetch(flat("w", 0, 2))


# --- missing and misshapen ---


def test_all_problems_are_listed(tmp_path, tensors):
    save_file(
        {**tensors, "steps": torch.arange(3), "tiny": torch.zeros(2).to(torch.float8_e4m3fn)},
        tmp_path / "m.safetensors",
    )
    wanted = {**shapes(tensors), "a.weight": (3, 5), "b.scale": (1,), "c.weight": (2,), "c.bias": (2,)}
    wanted |= {"steps": (3,), "tiny": (2,)}
    problems = FileAnchor(tmp_path).problems(wanted)
    assert [p.partition(":")[0] for p in problems] == [
        "a.weight",
        "b.scale",
        "c.weight",
        "c.bias",
        "steps",
        "tiny",
    ]
    text = "\n".join(problems)
    assert "a.weight: has shape [3, 5], in " in text
    assert "it has [5, 3]" in text
    assert f"c.weight: missing in {tmp_path} (closest there: " in text
    assert "steps: is I64 in " in text
    assert "tiny: is F8_E4M3 in " in text


def test_missing_layer_raises_or_is_zero(single, tensors):
    wanted = {**shapes(tensors), "lora_A": (2, 2)}
    assert len(FileAnchor(single).problems(wanted)) == 1
    with pytest.raises(AnchorError, match=r"^lora_A: missing in .*anchor_missing: zero"):
        FileAnchor(single).fetch(flat("lora_A", 0, 4))
    lenient = FileAnchor(single, missing="zero")
    assert lenient.problems(wanted) == []
    assert lenient.fetch(flat("lora_A", 0, 4)) is None
    assert_same(lenient.fetch(flat("a.bias", 0, 5)), tensors["a.bias"])


def test_misshapen_is_a_problem_also_where_missing_is_zero(single):
    (problem,) = FileAnchor(single, missing="zero").problems({"a.weight": (5, 4), "new": (1,)})
    assert problem.startswith("a.weight: has shape [5, 4]")


def test_a_file_that_holds_nothing_wanted_is_the_wrong_file(single, tensors):
    lenient = FileAnchor(single, missing="zero")
    (problem,) = lenient.problems({"x.y.z": (1,), "q": (2,)})
    assert "holds none of the 2 layers, so it is probably the wrong file" in problem
    assert lenient.problems(shapes(tensors)) == []
    # Layers added later, all of them new, are no sign of a wrong file any more.
    assert lenient.problems({"lora_B": (2,)}) == []
    assert len(FileAnchor(single).problems({"x.y.z": (1,), "q": (2,)})) == 2


def test_no_layers_no_problems(single):
    assert FileAnchor(single, missing="zero").problems({}) == []


# --- damage ---


def first_problem(path: Path, **wanted: tuple[int, ...]) -> str:
    """The one sentence about `path`, which `fetch` has to raise as well."""
    wanted = wanted or {"x": (2,)}
    (problem,) = FileAnchor(path).problems(wanted)
    layer = next(iter(wanted))
    with pytest.raises(AnchorError) as error:
        FileAnchor(path).fetch(flat(layer, 0, 1))
    assert str(error.value).startswith(f"{layer}: ")
    return problem


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str = "F32", shape: object = (2,), span: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


def test_every_truncation_is_noticed(tmp_path):
    save_file({"x": values(2), "y": values(3)}, tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        assert str(cut) in first_problem(cut)
    cut.write_bytes(data[:-1])
    assert "truncated: tensor 'y' ends at byte" in first_problem(cut)
    cut.write_bytes(data + b"\0")
    assert "corrupt: 21 bytes of data, its header describes 20" in first_problem(cut)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{" * 40, "corrupt header: "),
        (b"[" * 100_000, "corrupt header: "),
        (b"\xff\xfe{}", "corrupt header: "),
        ([1], "corrupt header: wanted an object, got list"),
        (b'{"x": {}, "x": {}}', "corrupt header: 'x' is given twice"),
        ({"x": 3}, "corrupt header: tensor 'x'"),
        ({"x": {}}, "corrupt header: tensor 'x'"),
        ({"x": entry(dtype=7)}, "corrupt header: tensor 'x'"),
        ({"x": entry(shape=[-2])}, "corrupt header: tensor 'x'"),
        ({"x": entry(shape=[2.0])}, "corrupt header: tensor 'x'"),
        ({"x": entry(shape=[True, 2])}, "corrupt header: tensor 'x'"),
        ({"x": entry(shape=[3])}, "corrupt header: tensor 'x'"),
        ({"x": entry(span=[8, 0])}, "corrupt header: tensor 'x'"),
        ({"x": entry(span=[0])}, "corrupt header: tensor 'x'"),
        ({"x": entry(span=[4, 12])}, "truncated: tensor 'x'"),
        ({"x": entry(span=[0, 8]), "y": entry(span=[4, 8], shape=[1])}, "tensor 'y' begins at 4, not at 8"),
        ({"y": entry(span=[4, 8], shape=[1])}, "tensor 'y' begins at 4, not at 0"),
        ({"x": entry(shape=[2**40, 2**40], span=[0, 2**82])}, "truncated: tensor 'x'"),
    ],
)
def test_corrupt_header(tmp_path, header, message):
    path = raw(tmp_path / "bad.safetensors", header, bytes(8))
    problem = first_problem(path)
    assert problem.startswith(f"{path}: ")
    assert message in problem


@pytest.mark.parametrize("length", [0, 1, 10_000, 2**63, 2**64 - 1])
def test_impossible_header_length(tmp_path, length):
    path = raw(tmp_path / "bad.safetensors", {"x": entry()}, bytes(8), length=length)
    assert "not a safetensors file, or cut off within its header" in first_problem(path)


@given(st.binary(max_size=64))
@settings(deadline=None)
def test_any_garbage_is_a_problem_and_nothing_else(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "garbage.safetensors"
    path.write_bytes(data)
    assert len(FileAnchor(path).problems({"x": (2,)})) == 1


def test_git_lfs_pointer(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "Git LFS pointer" in first_problem(path)


def test_file_that_changed_in_between(single, tensors):
    anchor = FileAnchor(single)
    assert anchor.problems(shapes(tensors)) == []
    os.truncate(single, single.stat().st_size - 4)
    with pytest.raises(AnchorError, match=r"^a\.bias: .*model\.safetensors: changed while it was in use"):
        anchor.fetch(flat("a.bias", 0, 5))
    single.unlink()
    with pytest.raises(AnchorError, match=r"^a\.bias: .*No such file"):
        anchor.fetch(flat("a.bias", 0, 5))


def test_file_that_ends_within_a_read(tmp_path):
    """As when another process cuts the file off after its size was checked."""
    path = tmp_path / "short"
    path.write_bytes(bytes(10))
    tensor = reader.StoredTensor(
        str(path), "x", "F32", torch.float32, (3,), begin=0, num_bytes=12, file_bytes=10
    )
    with pytest.raises(AnchorError, match="truncated while tensor 'x' was read"):
        reader.read_piece(tensor, FlatRange(0), numel=3)


def test_integer_tensor_is_refused(tmp_path):
    save_file({"x": torch.arange(2)}, tmp_path / "m.safetensors")
    assert "is I64" in first_problem(tmp_path)


# --- directories and indices ---


def test_absent_path(tmp_path):
    assert "no such file or directory; wanted the path of a safetensors checkpoint" in first_problem(
        tmp_path / "no"
    )
    assert "no such file" in first_problem(tmp_path / "no.index.json")


def test_directory_without_weights(tmp_path):
    assert "holds no *.safetensors" in first_problem(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin would have to be unpickled" in first_problem(tmp_path)


def test_directory_that_could_mean_several_checkpoints(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.fp16.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")
    problem = first_problem(tmp_path)
    assert "model.fp16.safetensors and model.safetensors both hold " in problem
    assert "name one file" in problem
    save_sharded(tmp_path, tensors, "model")
    save_sharded(tmp_path, tensors, "other")
    assert "several indices (model.safetensors.index.json, other" in first_problem(tmp_path)


def index_of(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "sub/../../x.safetensors", "/etc/x.safetensors", "..\\x", "C:\\x", "\\\\host\\x"],
)
def test_index_may_not_lead_out_of_its_directory(tmp_path, name):
    save_file({"x": values(2)}, tmp_path.parent / "x.safetensors")
    index_of(tmp_path, {"weight_map": {"x": name}})
    assert "leads out of the checkpoint's directory" in first_problem(tmp_path)


def test_index_may_name_folders_below(tmp_path):
    (tmp_path / "sub").mkdir()
    save_file({"x": values(2)}, tmp_path / "sub" / "x.safetensors")
    index_of(tmp_path, {"weight_map": {"x": "sub/x.safetensors"}})
    assert_same(FileAnchor(tmp_path).fetch(flat("x", 0, 2)), values(2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a valid index: "),
        ("[]", "not a valid index: wanted an object, got list"),
        ("{}", "not a valid index: wanted a weight_map of tensor to file, got None"),
        ({"weight_map": ["x"]}, "wanted a weight_map of tensor to file, got ['x']"),
        ({"weight_map": {"x": 3}}, "tensor 'x': wanted a file name, got 3"),
        ({"weight_map": {"x": ""}}, "tensor 'x': wanted a file name, got ''"),
        ({"weight_map": {"x": "a\0b"}}, "tensor 'x': wanted a file name"),
        ('{"weight_map": {"x": "a", "x": "b"}}', "'x' is given twice"),
    ],
)
def test_bad_index(tmp_path, content, message):
    path = index_of(tmp_path, content)
    problem = first_problem(path)
    assert problem.startswith(str(path))
    assert message in problem


def test_index_and_files_that_disagree(tmp_path):
    tensors = {name: values(2) for name in ("x", "y", "z", "v")}
    save_sharded(tmp_path, tensors)
    files = sorted(tmp_path.glob("*.safetensors"))
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-1])
    save_file({"other": values(2)}, files[2])
    problems = FileAnchor(tmp_path).problems(shapes(tensors))
    assert len(problems) == 3
    assert f"{files[0]}: cannot be read: No such file or directory (needed for x)" in problems
    assert any(p.startswith(f"{files[1]}: truncated: tensor 'y'") and "(needed for y)" in p for p in problems)
    assert any(p.startswith(f"{files[2]}: lacks tensor 'z'") for p in problems)
    # What is whole can still be read.
    assert_same(FileAnchor(tmp_path).fetch(flat("v", 0, 2)), values(2))


def test_unreadable_file_is_named_once_for_all_its_layers(tmp_path):
    names = [f"layer{i}" for i in range(9)]
    index_of(tmp_path, {"weight_map": dict.fromkeys(names, "gone.safetensors")})
    (problem,) = FileAnchor(tmp_path).problems(dict.fromkeys(names, (2,)))
    assert "(needed for layer0, layer1, layer2, layer3, layer4, ... (4 more))" in problem


@pytest.mark.parametrize("arguments", [{"dtype": "int8"}, {"missing": "ignore"}])
def test_arguments_are_checked(tmp_path, arguments):
    with pytest.raises(AnchorError, match=r"wanted .*got "):
        FileAnchor(tmp_path, **arguments)


def test_every_box_of_a_small_tensor(tmp_path):
    tensor = values(2, 3, 4)
    save_file({"x": tensor}, tmp_path / "m.safetensors")
    anchor = FileAnchor(tmp_path)
    ranges = [[(o, n) for o in range(size) for n in range(1, size - o + 1)] for size in tensor.shape]
    with mock.patch.multiple(reader, _CHUNK_BYTES=32, _READ_THROUGH_BYTES=16):
        for dims in itertools.product(*ranges):
            offsets, sizes = zip(*dims, strict=True)
            want = tensor[tuple(slice(o, o + n) for o, n in dims)]
            assert_same(anchor.fetch(box("x", offsets, sizes)), want)


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8])
def test_every_box_of_a_small_tensor_in_a_dtype_that_may_lose(tmp_path, limit):
    tensor = values(2, 3, 4)
    save_file({"x": tensor}, tmp_path / "m.safetensors")
    anchor = FileAnchor(tmp_path, dtype="float16")
    ranges = [[(o, n) for o in range(size) for n in range(1, size - o + 1)] for size in tensor.shape]

    def filled(*args, **kwargs):
        # What is not written must not happen to be right, as memory used before may be.
        return torch.zeros(*args, **kwargs).sub_(1000)

    with mock.patch.object(casting, "_CHUNK", limit), mock.patch.object(torch, "empty", filled):
        for dims in itertools.product(*ranges):
            offsets, sizes = zip(*dims, strict=True)
            want = tensor[tuple(slice(o, o + n) for o, n in dims)]
            assert_same(anchor.fetch(box("x", offsets, sizes)), want.half())
