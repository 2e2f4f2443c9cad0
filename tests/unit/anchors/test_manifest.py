"""A manifest beside an anchor's files: what it notices, what it refuses, what it leaves alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sharded_spd import SPDConfig, attach
from sharded_spd.anchors import TensorAnchor, blocks
from sharded_spd.anchors.fingerprint import combine, slice_fingerprint
from sharded_spd.anchors.manifest import MANIFEST, read_manifest
from sharded_spd.anchors.tools.build import add_manifest, verify
from sharded_spd.config import AnchorConfig, LayerConfig
from sharded_spd.errors import AnchorError
from sharded_spd.sharding.layout import FlatRange, ShardSlice
from tests.support.anchors import BESIDE, NAME, bind_to, flip, make_anchor, make_model, rewrite, tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_anchor(tmp_path / "anchor")


# --- what it holds ---


def test_it_holds_what_binding_computes(folder: Path) -> None:
    """The fingerprints of whole tensors are those of layers, and of the whole file that of the model."""
    manifest = read_manifest(folder / MANIFEST)
    assert set(manifest.tensors) == {*tensors(), *BESIDE}
    for name, tensor in tensors().items():
        piece = ShardSlice(name, 0, tensor.numel(), FlatRange(0))
        want = slice_fingerprint(tensor.reshape(-1), piece, tuple(tensor.shape))
        assert manifest.tensors[name].fingerprint == tuple(want.tolist())
        assert manifest.tensors[name].shape == tuple(tensor.shape)
    assert manifest.fingerprint == combine(
        {name: manifest.tensors[name].fingerprint for name in (*tensors(), "empty")}
    )
    assert manifest.files[NAME].num_bytes == (folder / NAME).stat().st_size
    assert manifest.num_parameters == sum(t.numel() for t in tensors().values())


def test_the_fingerprint_of_a_file_of_just_the_layers_is_the_projectors(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / NAME)
    assert add_manifest(str(tmp_path)).fingerprint == bind_to(tmp_path).fingerprint


def test_the_last_bits_of_float64_count_and_lossless_copies_do_not() -> None:
    values = torch.randn(300)
    piece = ShardSlice("w", 0, 300, FlatRange(0))

    def print_of(v: torch.Tensor) -> list[int]:
        return slice_fingerprint(v, piece, (300,)).tolist()

    assert print_of(values.double()) == print_of(values)
    moved = values.double()
    moved[7] += 1e-12
    assert print_of(moved) != print_of(values)
    turned = values.double()
    turned[7] += 2e-12
    assert print_of(turned) != print_of(moved)


def test_sampled_blocks_are_the_first_the_last_and_some_between() -> None:
    spans = blocks.block_spans("layer", 100_000)
    assert (spans[0], spans[-1]) == ((0, 4096), (100_000 - 4096, 100_000))
    assert len(spans) == 4
    assert spans == blocks.block_spans("layer", 100_000) != blocks.block_spans("other", 100_000)
    assert all(0 <= begin and end <= 100_000 and end - begin == 4096 for begin, end in spans)
    assert (blocks.block_spans("x", 0), blocks.block_spans("x", 7)) == ([], [(0, 7)])


# --- what it notices ---


def test_untouched_files_bind_and_verify(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    projector = bind_to(folder)
    assert projector.bound
    assert (verify(str(folder)), verify(str(folder / NAME), sampled=True)) == ([], [])
    assert not [w for w in recwarn if "anchor" in str(w.message)]


@pytest.mark.parametrize("key", list(tensors()))
def test_every_byte_counts(folder: Path, key: str) -> None:
    """Some byte of each tensor, spread over it: binding and verifying both name the tensor."""
    pristine = (folder / NAME).read_bytes()
    num_bytes = tensors()[key].nbytes
    for byte in sorted({0, num_bytes - 1, *range(0, num_bytes, max(1, num_bytes // 9))}):
        (folder / NAME).write_bytes(pristine)
        flip(folder / NAME, key, byte)
        with pytest.raises(AnchorError, match=rf"\b{key}\b"):
            bind_to(folder)
        found = verify(str(folder))
        assert len(found) == 1
        assert f"({key})" in found[0]


def test_a_byte_between_the_samples_is_found_by_all_but_the_samples(folder: Path) -> None:
    spans = blocks.block_spans("big", 160_000)
    hidden = next(i for i in range(160_000) if not any(begin <= i < end for begin, end in spans))
    flip(folder / NAME, "big", hidden)
    assert verify(str(folder), sampled=True) == []
    assert len(verify(str(folder))) == 1
    with pytest.raises(AnchorError, match=r"\(1 layer.*: big\): has other values than the manifest"):
        bind_to(folder)


def test_a_byte_of_what_no_layer_needs_is_left_to_verify(folder: Path) -> None:
    flip(folder / NAME, "ids", 5)
    assert bind_to(folder).bound
    assert "(ids)" in verify(str(folder))[0]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_swapped_tensors(folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names swapped between tensors of one shape: both are named, and verify says whose values they are."""
    rewrite(folder / NAME, lambda t: {**t, "a": t["b"], "b": t["a"]})
    with pytest.raises(AnchorError, match=r"(?s)\ba:.*\bb:"):
        bind_to(folder, dtype=dtype)
    found = "\n".join(verify(str(folder)))
    assert "those of 'b'" in found
    assert "those of 'a'" in found
    monkeypatch.setattr("sharded_spd.anchors.manifest.hash_blocks", lambda t: _blocks(folder, t.name))
    with pytest.raises(AnchorError, match=r"\(2 layer.*: a, b\): has other values than the manifest"):
        bind_to(folder, dtype=dtype)


def _blocks(folder: Path, name: str) -> tuple[str, ...]:
    return tuple(json.loads((folder / MANIFEST).read_text())["tensors"][name]["blocks"])


def test_a_byte_changed_below_a_lossy_dtype_is_found(folder: Path) -> None:
    """The lowest bit of a float32 is rounded away in bfloat16; its file is damaged all the same."""
    spans = blocks.block_spans("big", 160_000)
    hidden = next(i for i in range(0, 160_000, 4) if not any(begin <= i < end for begin, end in spans))
    flip(folder / NAME, "big", hidden)
    with pytest.raises(AnchorError, match=r"\(1 layer.*: big\): has other values than the manifest"):
        bind_to(folder, dtype="bfloat16")


def test_a_fine_tuned_file_in_place_of_the_pre_trained_one(folder: Path) -> None:
    rewrite(folder / NAME, lambda t: {**t, "big": t["big"] + 1e-3})
    with pytest.raises(AnchorError, match=r"big: .*model\.safetensors \(big\): has other values"):
        bind_to(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {**t, "a": t["a"].double()}, r"bytes long, \d+ by"),
        (lambda t: {**t, "a": t["a"].reshape(16, 24)}, r"F32 \[16, 24\], F32 \[24, 16\] by"),
        (lambda t: {**t, "narrow": t["narrow"].half()}, r"\(narrow\): is F16 \[9\], BF16 \[9\] by"),
    ],
)
def test_another_shape_dtype_or_size(folder: Path, change, message: str) -> None:
    start = {k: v for k, v in change({**tensors(), **BESIDE}).items() if k in tensors()}
    rewrite(folder / NAME, change)
    with pytest.raises(AnchorError, match=message):
        bind_to(folder, start)
    assert verify(str(folder))


def test_a_tensor_more_or_less(folder: Path) -> None:
    rewrite(folder / NAME, lambda t: {k: v for k, v in t.items() if k != "mask"} | {"mosk": t["mask"]})
    found = "\n".join(verify(str(folder)))
    assert "(mosk)" in found
    assert "mask: is missing" in found


def test_a_file_written_anew_is_noticed_although_its_values_are_the_same(folder: Path) -> None:
    save_file(dict(reversed(load_file(folder / NAME).items())), folder / NAME, metadata={"x": "y" * 10})
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][NAME]["bytes"] = (folder / NAME).stat().st_size
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (found,) = verify(str(folder))
    assert "SHA-256" in found


def test_a_missing_or_cut_file(folder: Path) -> None:
    content = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(content[:-10])
    assert "truncated" in "".join(verify(str(folder)))
    (folder / NAME).unlink()
    assert "is missing" in "".join(verify(str(folder)))


def test_a_manifest_of_other_files_says_nothing_of_a_file_that_is_named(folder: Path) -> None:
    save_file(tensors(), folder / "other.safetensors")
    assert bind_to(folder / "other.safetensors").bound
    with pytest.raises(AnchorError, match=r"other\.safetensors both hold"):
        bind_to(folder)
    (folder / NAME).unlink()
    with pytest.raises(AnchorError, match=r"other\.safetensors: is not among the files .*needed for a, b"):
        bind_to(folder)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_binding_again_finds_nothing_new(folder: Path, dtype: str) -> None:
    projector = bind_to(folder, dtype=dtype)
    before = projector.fingerprint
    projector.bind()
    assert projector.fingerprint == before


# --- the manifest itself ---


def _edited(folder: Path, edit: Callable[[dict], object]) -> Path:
    content = json.loads((folder / MANIFEST).read_text())
    edit(content)
    (folder / MANIFEST).write_text(json.dumps(content))
    return folder / MANIFEST


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(version=2), "version 2"),
        (lambda c: c.update(version=True), "wanted format"),
        (lambda c: c.update(format="x"), "wanted format"),
        (lambda c: c.pop("files"), "keys"),
        (lambda c: c.update(more=1), "keys"),
        (lambda c: c.update(source=1), "source is 1"),
        (lambda c: c.update(dtypes=["F32"]), "dtypes is"),
        (lambda c: c.update(fingerprint="0" * 32), "fingerprint is"),
        (lambda c: c["files"].update({"../x": c["files"][NAME]}), "leads out"),
        (lambda c: c["files"].update({"/x": c["files"][NAME]}), "leads out"),
        (lambda c: c["files"].update({"C:\\x": c["files"][NAME]}), "leads out"),
        (lambda c: c["files"][NAME].update(bytes=-1), "described by"),
        (lambda c: c["files"][NAME].update(sha256="zz"), "described by"),
        (lambda c: c["tensors"].update(a=3), "tensor 'a' is 3"),
        (lambda c: c["tensors"]["a"].update(shape=[1.5]), "described by"),
        (lambda c: c["tensors"]["a"].update(fingerprint=["0" * 16]), "described by"),
        (lambda c: c["tensors"]["a"].update(fingerprint=["0" * 16] * 2), "damaged or edited"),
        (lambda c: c["tensors"]["a"].update(blocks="x"), "described by"),
        (lambda c: c["tensors"]["a"].update(dtype=None), "described by"),
    ],
)
def test_a_damaged_manifest(folder: Path, edit, message: str) -> None:
    path = _edited(folder, edit)
    with pytest.raises(AnchorError, match=message):
        read_manifest(path)
    with pytest.raises(AnchorError, match=message):
        bind_to(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 1, "format": 1}', "\xff"])
def test_a_manifest_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_bytes(text.encode("latin1"))
    with pytest.raises(AnchorError, match="not a valid manifest"):
        bind_to(folder)


# --- anchor.fingerprint ---


def test_the_expected_fingerprint_may_be_the_layers_or_that_of_all_in_the_files(folder: Path) -> None:
    own, whole = bind_to(folder).fingerprint, read_manifest(folder / MANIFEST).fingerprint
    assert own != whole  # the files hold a tensor more
    assert bind_to(folder, fingerprint=own.upper()).bound
    assert bind_to(folder, fingerprint=whole).bound
    with pytest.raises(AnchorError, match=f"wanted fingerprint {'0' * 32}, got {own}.*says {whole}"):
        bind_to(folder, fingerprint="0" * 32)
    (folder / MANIFEST).unlink()
    assert bind_to(folder, fingerprint=own).bound
    with pytest.raises(AnchorError, match=f"wanted fingerprint {whole}, got {own}"):
        bind_to(folder, fingerprint=whole)


def test_the_expected_fingerprint_names_what_differs_from_the_manifest(folder: Path) -> None:
    whole = read_manifest(folder / MANIFEST).fingerprint
    flip(folder / NAME, "b", 2)
    with pytest.raises(AnchorError, match=r"\bb\b"):
        bind_to(folder, fingerprint=whole)


def test_the_expected_fingerprint_of_a_snapshot(folder: Path) -> None:
    own = bind_to(folder).fingerprint
    assert bind_to("snapshot", fingerprint=own).bound
    with pytest.raises(AnchorError, match=r"^anchor snapshot of 5 layer.*: another anchor than"):
        bind_to("snapshot", {**tensors(), "a": tensors()["a"] + 1}, fingerprint=own)


def test_the_expected_fingerprint_of_given_tensors(folder: Path) -> None:
    own = bind_to(folder).fingerprint
    assert bind_to(TensorAnchor(tensors()), fingerprint=own).bound
    with pytest.raises(AnchorError, match=r"^anchor tensors of 5 layer.*: another anchor than"):
        bind_to(TensorAnchor({**tensors(), "a": torch.zeros(24, 16)}), fingerprint=own)


def test_layers_with_another_anchor_do_not_count(folder: Path) -> None:
    kept = combine(
        {
            name: e.fingerprint
            for name, e in read_manifest(folder / MANIFEST).tensors.items()
            if name in tensors() and name != "narrow"
        }
    )
    probe = make_model()
    config = SPDConfig(
        anchor=AnchorConfig(source=str(folder / NAME), fingerprint=kept),
        layers=(LayerConfig(pattern="narrow", anchor="zero"),),
    )
    assert attach(torch.optim.Adam(probe.parameters()), probe, config).bound


def test_binding_again_does_not_ask_again(folder: Path) -> None:
    """A group that came later is none of those that the fingerprint was of."""
    probe = make_model()
    params = dict(probe.named_parameters())
    late = params.pop("narrow")
    manifest = read_manifest(folder / MANIFEST)
    own = combine({name: manifest.tensors[name].fingerprint for name in params})
    (folder / MANIFEST).unlink()
    optimizer = torch.optim.Adam(params.values())
    config = SPDConfig(anchor=AnchorConfig(source=str(folder), fingerprint=own))
    projector = attach(optimizer, probe, config)
    optimizer.add_param_group({"params": [late]})
    projector.bind()
