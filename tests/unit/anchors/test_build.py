"""Building an anchor's files, and the commands: what is written, what is refused, exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sharded_spd.anchors import blocks
from sharded_spd.anchors.checkpoint import Checkpoint
from sharded_spd.anchors.manifest import MANIFEST, read_manifest
from sharded_spd.anchors.tools import build as work
from sharded_spd.anchors.tools import scan
from sharded_spd.anchors.tools.build import add_manifest, build, parse_size, verify
from sharded_spd.errors import AnchorError
from tests.support.anchors import BESIDE, NAME, flip, make_anchor, tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_anchor(tmp_path / "anchor")


def everything(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors as the format's own reader has them; each is in one file only."""
    result: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        held = load_file(file)
        assert held.keys().isdisjoint(result)
        result |= held
    return result


@pytest.mark.parametrize("limit", [1, 2000, 5_000, 10**9])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_build(tmp_path: Path, folder: Path, limit: int, dtype: torch.dtype | None) -> None:
    """The format's own reader finds every tensor, floating point in `dtype`, as torch casts it."""
    target = tmp_path / "new" / "copy"
    built = build(str(folder), target, dtype=dtype, max_shard_bytes=limit)
    want = {**{k: t.to(dtype or t.dtype) for k, t in tensors().items()}, **BESIDE}
    want["empty"] = BESIDE["empty"].to(dtype or torch.float32)
    got = everything(target)
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype
        assert torch.equal(got[key], tensor), key
    assert verify(str(target)) == verify(str(target), sampled=True) == []
    assert set(built.lossy) == {k for k, t in tensors().items() if not torch.equal(t.to(dtype or t.dtype), t)}
    assert sorted(p.name for p in target.parent.iterdir()) == ["copy"]
    files = sorted(p.name for p in target.glob("*.safetensors"))
    if limit == 10**9:
        assert files == [NAME]
        assert not list(target.glob("*.index.json"))
        return
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    for file in files:
        held = load_file(target / file)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= limit
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in want.values())
    assert {k: load_file(target / f)[k].shape for k, f in index["weight_map"].items()} == {
        k: t.shape for k, t in want.items()
    }


def test_a_built_file_is_aligned_and_marked_as_torchs(tmp_path: Path, folder: Path) -> None:
    build(str(folder), tmp_path / "copy")
    with safe_open(tmp_path / "copy" / NAME, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    header = Checkpoint(str(tmp_path / "copy")).header(str(tmp_path / "copy" / NAME))
    for key, tensor in {**tensors(), **BESIDE}.items():
        assert header[key].begin % tensor.itemsize == 0 or tensor.numel() == 0


def test_small_chunks_make_no_difference(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_manifest(folder / MANIFEST)
    monkeypatch.setattr(scan, "CHUNK_BYTES", 24)
    done: list[int] = []
    pieces = work.scan(Checkpoint(str(folder)), progress=done.append)
    assert (pieces.tensors, pieces.files) == (whole.tensors, whole.files)
    assert sum(done) == sum(t.nbytes for t in {**tensors(), **BESIDE}.values())
    assert max(done) == 24
    built = build(str(folder), tmp_path / "copy", dtype=torch.bfloat16)
    monkeypatch.undo()
    assert built.manifest.tensors == build(str(folder), tmp_path / "b", dtype=torch.bfloat16).manifest.tensors


def test_what_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(AnchorError, match="is there already"):
        add_manifest(str(folder))
    with pytest.raises(AnchorError, match="exists already"):
        build(str(folder), folder)
    (tmp_path / "taken").mkdir()
    with pytest.raises(AnchorError, match="exists already"):
        build(str(folder), tmp_path / "taken")
    (tmp_path / "file").write_text("x")
    with pytest.raises(AnchorError, match="cannot be written"):
        build(str(folder), tmp_path / "file" / "below")
    with pytest.raises(AnchorError, match="no such file"):
        build(str(tmp_path / "nowhere"), tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["anchor", "file", "taken"]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_damaged_source_is_not_copied(tmp_path: Path, folder: Path, dtype: torch.dtype | None) -> None:
    flip(folder / NAME, "b", 3)
    with pytest.raises(AnchorError, match=r": b: has other values"):
        build(str(folder), tmp_path / "new", dtype=dtype)
    assert [p.name for p in tmp_path.iterdir()] == ["anchor"]


def test_a_build_that_fails_leaves_nothing(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AnchorError, match="No space left"):
        build(str(folder), tmp_path / "new")
    (folder / MANIFEST).unlink()
    with pytest.raises(AnchorError, match="No space left"):
        add_manifest(str(folder))
    assert [p.name for p in tmp_path.iterdir()] == ["anchor"]
    assert [p.name for p in folder.iterdir()] == [NAME]


@pytest.mark.parametrize(
    ("text", "want"),
    [("5GB", 5 * 10**9), ("1.5 MiB", 3 << 19), ("7", 7), ("2kb", 2000), ("", 0), ("0GB", 0), ("5 apples", 0)],
)
def test_sizes(text: str, want: int) -> None:
    if want:
        assert parse_size(text) == want
        return
    with pytest.raises(AnchorError, match="wanted a size such as 5GB"):
        parse_size(text)


@dataclass
class Done:
    code: int | str | None
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs `sharded-spd anchor` in this process."""
    pytest.importorskip("typer")
    from sharded_spd.cli.app import main

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["sharded-spd", "anchor", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Done(ended.value.code, captured.out, captured.err)

    return run


def test_info_without_and_with_a_manifest(tmp_path: Path, folder: Path, run: Callable[..., Done]) -> None:
    save_file(tensors(), tmp_path / NAME)
    without, given = run("info", tmp_path), run("info", folder)
    assert (without.code, without.err, given.code) == (0, "", 0)
    assert work.scan(Checkpoint(str(tmp_path))).fingerprint in without.out
    assert read_manifest(folder / MANIFEST).fingerprint in given.out
    assert re.search(r"manifest +no", without.out)
    assert re.search(r"manifest +yes", given.out)
    assert re.search(r"tensors +5, 40,782 parameters", without.out)
    assert re.search(r"dtypes +BF16, BOOL, F32, F64, I64", given.out)


def test_build_command(tmp_path: Path, folder: Path, run: Callable[..., Done]) -> None:
    target = tmp_path / "dst"
    options = ("--dtype", "bfloat16", "--max-shard-size", "50KB", "--name", "org/name")
    built = run("build", folder, target, *options)
    assert built.code == 0
    assert re.fullmatch(r"warning: bfloat16 changed the values of 4 tensor.*\n", built.err)
    assert len(list(target.glob("model-*-of-*.safetensors"))) > 1
    assert read_manifest(target / MANIFEST).source == "org/name"
    for more in ((), ("--manifest-only",)):
        (folder / MANIFEST).unlink()
        assert run("build", folder, *more).code == 0
        assert verify(str(folder)) == []


def test_verify_command(folder: Path, run: Callable[..., Done]) -> None:
    assert run("verify", folder).code == 0
    spans = blocks.block_spans("big", 160_000)
    hidden = next(i for i in range(160_000) if not any(begin <= i < end for begin, end in spans))
    flip(folder / NAME, "big", hidden)
    verified = run("verify", folder)
    assert verified.code == 1
    assert "(big): has other values" in verified.out
    assert run("verify", folder, "--sampled").code == 0
    flip(folder / NAME, "a", 0)
    assert run("verify", folder, "--sampled").code == 1


def test_user_errors_of_the_commands(tmp_path: Path, folder: Path, run: Callable[..., Done]) -> None:
    save_file(tensors(), tmp_path / NAME)
    for arguments, message in (
        (("verify", tmp_path), "has no anchor.json"),
        (("verify", tmp_path / "x"), "no such file"),
        (("info", tmp_path / "x"), "no such file"),
        (("build", folder), "is there already"),
        (("build", tmp_path, folder), "exists already"),
        (("build", tmp_path, tmp_path / "x", "--max-shard-size", "5 apples"), "wanted a size"),
        (("build", tmp_path, "--dtype", "float16"), "name a target"),
        (("build", tmp_path, tmp_path / "x", "--manifest-only"), "writes beside"),
    ):
        done = run(*arguments)
        assert (done.code, message in done.err, "Traceback" in done.err) == (2, True, False), done


def test_the_command_takes_names_of_the_cache(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    repo = tmp_path / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("hash")
    (repo / "snapshots").mkdir()
    manifest = read_manifest(make_anchor(repo / "snapshots" / "hash") / MANIFEST)
    command = [sys.executable, "-m", "sharded_spd", "anchor", "info", "org/name"]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path)}
    info = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert manifest.fingerprint in info.stdout
