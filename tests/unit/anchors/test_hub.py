"""Names of the Hugging Face hub as anchors: looked up in the local cache, never fetched."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from sharded_spd.anchors import FileAnchor
from sharded_spd.anchors.manifest import MANIFEST
from sharded_spd.anchors.tools.build import verify
from sharded_spd.sharding.layout import FlatRange, ShardSlice
from tests.support.anchors import NAME, make_anchor, rewrite, tensors

COMMIT, OTHER = "1" * 40, "2" * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_anchor(tmp_path / "anchor")


@pytest.fixture
def hub(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    for revision, commit in (("main", COMMIT), ("v2", OTHER)):
        (repo / "refs" / revision).write_text(commit)
        shutil.copytree(folder, repo / "snapshots" / commit)
    rewrite(repo / "snapshots" / OTHER / NAME, lambda t: {**t, "a": t["a"] + 1})
    (repo / "snapshots" / OTHER / MANIFEST).unlink()
    return repo


def test_a_name_is_looked_up_in_the_local_cache(hub: Path, folder: Path) -> None:
    piece = ShardSlice("a", 0, 10, FlatRange(0))
    shapes = {"a": (24, 16)}
    want = tensors()["a"].reshape(-1)[:10]
    for source, shift in (("org/name", 0), (f"org/name@{COMMIT}", 0), ("org/name@v2", 1)):
        store = FileAnchor(source)
        assert store.problems(shapes) == []
        assert torch.equal(store.fetch(piece), want + shift)
        assert store.source == source
    assert verify("org/name") == []


def test_a_name_that_is_nowhere(hub: Path) -> None:
    for source, command in (
        ("org/other", "hf download org/other"),
        ("org/name@v3", "hf download org/name --revision v3"),
    ):
        (problem,) = FileAnchor(source).problems({"a": (1,)})
        assert "no such file or directory, nor in the local cache" in problem
        assert problem.endswith(command)


def test_a_path_comes_before_a_name(hub: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub.parent)
    (hub.parent / "org").mkdir()
    shutil.copytree(hub / "snapshots" / OTHER, hub.parent / "org" / "name")
    got = FileAnchor("org/name").fetch(ShardSlice("a", 0, 1, FlatRange(0)))
    assert float(got) == float(tensors()["a"][0, 0] + 1)


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (problem,) = FileAnchor("org/name").problems({"a": (1,)})
    assert "pip install huggingface_hub" in problem
