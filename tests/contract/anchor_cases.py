"""An anchor's files that are not what their manifest or the configuration says: every rank has to know."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sharded_spd import SPDConfig, attach
from sharded_spd.anchors.blocks import block_spans
from sharded_spd.anchors.manifest import MANIFEST, Manifest
from sharded_spd.anchors.tools.build import add_manifest
from sharded_spd.config import AnchorConfig, LayerConfig
from sharded_spd.errors import AnchorError
from sharded_spd.projection.projector import Projector
from sharded_spd.safetensors_io.reader import read_header
from tests.parity.cases import SPD, gradients, tensors
from tests.support.engines import Engine
from tests.support.models import Probe
from tests.support.refusals import refused
from tests.support.training import Form, Training

SHAPES = {"big.weight": (64, 600), "like.weight": (64, 600), "last.weight": (5, 7)}


def _node(engine: Engine, start: dict[str, Tensor]) -> tuple[Path, Manifest]:
    """A checkpoint of this rank's own with its manifest, as on the disk of its node."""
    folder = engine.scratch / f"anchor{engine.rank}"
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    save_file(start, folder / "model.safetensors")
    return folder, add_manifest(str(folder))


def one_corrupted_byte(engine: Engine, *, form: Form, manifest_on: int) -> None:
    """Where only the last rank reads it, and only one rank has the manifest: the sums tell, all raise."""
    start = tensors(SHAPES)
    folder, manifest = _node(engine, start)
    file, name = folder / "model.safetensors", "like.weight"
    if engine.rank == engine.world - 1:
        tensor = read_header(str(file))[name]
        spans = block_spans(name, tensor.num_bytes)
        hidden = [i for i in range(tensor.num_bytes) if not any(begin <= i < end for begin, end in spans)]
        content = bytearray(file.read_bytes())
        content[tensor.begin + hidden[-1]] ^= 1
        file.write_bytes(content)
    if engine.rank != manifest_on:
        Path(manifest.path).unlink()
    refused(
        engine,
        lambda: Training(engine, start, SPD, form=form, anchor=str(folder), give_model=True),
        (AnchorError,),
        r"\(1 layer.*: like\.weight\): has other values than the manifest",
    )


def swapped_tensors(engine: Engine, *, form: Form) -> None:
    """Two tensors of one shape under each other's name, in the files of the last rank's node."""
    start = tensors(SHAPES)
    folder, _ = _node(engine, start)
    if engine.rank == engine.world - 1:
        swapped = {**start, "big.weight": start["like.weight"], "like.weight": start["big.weight"]}
        save_file(swapped, folder / "model.safetensors")
    refused(
        engine,
        lambda: Training(engine, start, SPD, form=form, anchor=str(folder), give_model=True),
        (AnchorError,),
        r"big\.weight",
        r"like\.weight",
    )


def expected_fingerprint(engine: Engine) -> None:
    """The right one binds; another raises, with and without a manifest."""
    start = tensors(SHAPES)
    folder, manifest = _node(engine, start)

    def bound(fingerprint: str) -> Training:
        anchor = AnchorConfig(source=str(folder), fingerprint=fingerprint)
        return Training(engine, start, SPD, form="attached", anchor=anchor)

    training = bound(manifest.fingerprint)
    assert training.projector.fingerprint == manifest.fingerprint
    wrong = manifest.fingerprint[::-1]
    refused(engine, lambda: bound(wrong), (AnchorError,), f"wanted fingerprint {wrong}", manifest.fingerprint)
    if engine.rank == 0:
        Path(manifest.path).unlink()
    refused(engine, lambda: bound(wrong), (AnchorError,), f"wanted fingerprint {wrong}", manifest.fingerprint)
    training.step(gradients(start, 1)[0])


def expected_fingerprint_of_a_layer_of_one_rank(engine: Engine) -> None:
    """Where ranks step layers of their own, those that lack the layer cannot judge, and yet raise."""
    start = tensors(SHAPES)
    folder, manifest = _node(engine, start)

    def bound(fingerprint: str) -> Projector:
        model = engine.wrap(Probe(start))
        groups = [{"params": [p], "lr": 0.01} for p in engine.named(model).values()]
        optimizer, model = engine.optimizer(model, torch.optim.Adam, groups)
        anchor = AnchorConfig(source=str(folder), fingerprint=fingerprint)
        layers = (LayerConfig(pattern=r"last\.weight", anchor=anchor),)
        return attach(optimizer, model, SPDConfig(layers=layers))

    assert bound(manifest.fingerprint).bound
    refused(engine, lambda: bound("0" * 32), (AnchorError,), "wanted fingerprint 0000", r"last\.weight")


def not_at_its_anchor(engine: Engine, *, form: Form) -> None:
    """A row that one rank holds differs: every rank says so at the first step, and only then."""
    start = tensors(SHAPES)
    moved = {**start, "last.weight": start["last.weight"].clone()}
    moved["last.weight"][-1] += 1.0
    folder, _ = _node(engine, start)
    for begin, wanted in ((start, 0), (moved, 1)):
        training = Training(engine, begin, SPD, form=form, anchor=str(folder), give_model=True)
        for given in gradients(start, 2):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                training.step(given)
            said = [str(w.message) for w in caught if "does not start at its anchor" in str(w.message)]
            assert len(said) == wanted, said
            assert all("1 layer(s)" in text and "last.weight" in text for text in said)
            wanted = 0
    assert torch.isfinite(training.weights()["last.weight"]).all()
