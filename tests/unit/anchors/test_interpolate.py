"""Checkpoints between two others: their values, their files, what is refused, and the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from sharded_spd.anchors.tools import interpolate as work
from sharded_spd.anchors.tools.alphas import parse_alphas
from sharded_spd.anchors.tools.interpolate import plan, write
from sharded_spd.cli.app import app
from sharded_spd.errors import AnchorError, ConfigError


def first() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "body.weight": torch.randn(37, 11),
        "body.bias": torch.randn(11, dtype=torch.float64),
        "norm": torch.randn(9).bfloat16(),
        "half": torch.randn(6).half(),
        "empty": torch.zeros(0, 3),
        "steps": torch.arange(4),
        "old.head": torch.randn(3),
    }


def second() -> dict[str, Tensor]:
    torch.manual_seed(2)
    moved = {k: t + torch.randn(t.shape).to(t.dtype) for k, t in first().items() if t.is_floating_point()}
    del moved["old.head"]
    return {**moved, "steps": torch.arange(4) + 10, "head.weight": torch.randn(2, 5)}


def save(folder: Path, tensors: Mapping[str, Tensor], *, files: int = 1) -> Path:
    """A checkpoint directory of so many files, with an index where there are several."""
    folder.mkdir()
    names = [f"model-{i}.safetensors" for i in range(files)] if files > 1 else ["model.safetensors"]
    where = {key: names[i % files] for i, key in enumerate(tensors)}
    for name in names:
        save_file({k: tensors[k] for k, n in where.items() if n == name}, folder / name)
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(f'{{"of": "{folder.name}"}}')
    return folder


def everything(folder: Path) -> dict[str, Tensor]:
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


@pytest.fixture
def ends(tmp_path: Path) -> tuple[str, str]:
    return str(save(tmp_path / "first", first())), str(save(tmp_path / "second", second(), files=2))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0, 1.5])
def test_values(tmp_path: Path, ends, alpha: float, monkeypatch) -> None:
    """The formula in float64, rounded once to the second one's dtype; what only one has is not mixed."""
    monkeypatch.setattr(work, "_CHUNK", 100)
    found = plan(*ends)
    assert set(found.kept) == {"steps", "head.weight"}
    assert found.left_out == ["old.head"]
    target = write(found, tmp_path / "out" / "mixed", alpha)
    a, b, got = first(), second(), everything(target)
    assert got.keys() == b.keys()
    for key, tensor in got.items():
        want = b[key]
        if key not in found.kept:
            mixed = (1 - alpha) * a[key].double() + alpha * b[key].double()
            want = mixed.to(b[key].dtype)
        assert tensor.dtype == b[key].dtype
        eps = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0
        torch.testing.assert_close(tensor, want, rtol=eps, atol=0 if tensor.dtype != torch.float64 else 1e-15)
        if alpha in (0, 1) and key not in found.kept:
            assert torch.equal(tensor, (b if alpha else a)[key])


def test_files(tmp_path: Path, ends) -> None:
    """Files, index and configuration are the second one's; weights of other formats are not carried along."""
    folder = Path(ends[1])
    for name in ("pytorch_model.bin", "anchor.json", "optimizer.pt", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "anchor.json").unlink()  # a damaged manifest is an error of its own
    target = write(plan(*ends), tmp_path / "mixed", 0.5)
    kept = {"config.json", "tokenizer.json", "model.safetensors.index.json", "interpolation.json"}
    assert {p.name for p in target.iterdir()} == {"model-0.safetensors", "model-1.safetensors", *kept}
    assert json.loads((target / "config.json").read_text()) == {"of": "second"}
    again = plan(ends[0], str(target))
    assert [p.end.name for p in again.pairs] == [p.end.name for p in plan(*ends).pairs]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "mixed", "second"]


def test_single_file_of_several(tmp_path: Path, ends) -> None:
    """A file that is named alone is mixed alone, without an index that names others."""
    one = Path(ends[1]) / "model-0.safetensors"
    target = write(plan(ends[0], str(one)), tmp_path / "mixed", 0.5)
    assert {p.name for p in target.iterdir()} == {"model-0.safetensors", "config.json", "interpolation.json"}
    assert everything(target).keys() == load_file(one).keys()


def test_base_model_and_model_with_a_head(tmp_path: Path) -> None:
    """Names that differ by the base model's prefix are the same layers."""
    a, b = first(), second()
    base = save(tmp_path / "base", {k: a[k] for k in ("body.weight", "body.bias", "norm")})
    with_head = {f"bert.{k}": b[k] for k in ("body.weight", "body.bias", "norm")}
    tuned = save(tmp_path / "tuned", {**with_head, "classifier.weight": torch.ones(2, 2)})
    found = plan(str(base), str(tuned))
    assert found.kept == ["classifier.weight"]
    got = everything(write(found, tmp_path / "mixed", 0.0))
    assert all(torch.equal(got[f"bert.{k}"], a[k]) for k in ("body.weight", "body.bias", "norm"))


def test_refused(tmp_path: Path, ends) -> None:
    other = save(tmp_path / "other", {**second(), "norm": torch.randn(10).bfloat16()})
    with pytest.raises(AnchorError, match=r"norm is BF16 \[9\] there, BF16 \[10\] here.*keep=PATTERN"):
        plan(ends[0], str(other))
    assert "norm" in plan(ends[0], str(other), keep=["nor*"]).kept
    with pytest.raises(AnchorError, match=r"keep: nonsense\* fits no tensor"):
        plan(*ends, keep=["nonsense*"])
    stranger = save(tmp_path / "stranger", {"x.y": torch.ones(3)})
    with pytest.raises(AnchorError, match="share no floating-point tensor"):
        plan(ends[0], str(stranger))
    found = plan(*ends)
    with pytest.raises(AnchorError, match="exists already"):
        write(found, ends[1], 0.5)
    with pytest.raises(AnchorError, match="alpha: wanted a finite number"):
        write(found, tmp_path / "mixed", float("nan"))
    (tmp_path / "file").write_text("")
    with pytest.raises(AnchorError, match="cannot be written"):
        write(found, tmp_path / "file" / "mixed", 0.5)
    body = Path(ends[0]) / "model.safetensors"
    body.write_bytes(body.read_bytes() + b"x")
    with pytest.raises(AnchorError, match="changed while it was in use"):
        write(found, tmp_path / "mixed", 0.5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "first", "other", "second", "stranger"]


def test_alphas() -> None:
    assert parse_alphas("0:1:0.1") == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    assert parse_alphas("0:1:0.4") == [0, 0.4, 0.8]
    assert parse_alphas("0.5") == [0.5]
    assert parse_alphas("0, .3,1") == [0, 0.3, 1]
    assert parse_alphas("0:1:0.3") == [0, 0.3, 0.6, 0.9]
    assert parse_alphas("-0.5,1.5") == [-0.5, 1.5]
    assert str(parse_alphas("-0")[0]) == "0.0"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "a",
            "0:1",
            "0:1:0",
            "0:1:-1",
            "1:0:0.1",
            "0,0",
            "nan",
            "0:inf:1",
            "0:1:1e-9",
            "1,,2",
            "0:1:1:1",
        ),
        *("0:1:1e-320", "0,-0", "0.1,0.10000000000001"),
    ],
)
def test_wrong_alphas(text: str) -> None:
    with pytest.raises(AnchorError, match="alpha: "):
        parse_alphas(text)


@given(st.floats(-5, 5), st.integers(0, 50), st.floats(0.001, 2))
def test_every_range_holds_both_ends(start: float, count: int, step: float) -> None:
    last = start + count * step
    found = parse_alphas(f"{start!r}:{last!r}:{step!r}")
    assert len(found) == count + 1
    assert found[0] == pytest.approx(start, abs=1e-9)
    assert found[-1] == pytest.approx(last, abs=1e-8)


def test_command(tmp_path: Path, ends) -> None:
    def run(*more: str) -> Any:
        return CliRunner().invoke(app, ["interpolate", *ends, "--alpha", "0:1:0.5", *more])

    out = str(tmp_path / "out")
    done = run("-o", out)
    assert done.exit_code == 0, done.exception
    assert done.stdout.split() == [
        f"{word}" for a in ("0", "0.5", "1") for word in ("wrote", f"{out}/alpha-{a}")
    ]
    assert f"as in {ends[1]} at every alpha: " in done.stderr
    assert "left out, " in done.stderr
    assert "old.head" in done.stderr
    again = run("-o", out).exception
    assert isinstance(again, ConfigError)
    assert f"{out}/alpha-0, {out}/alpha-0.5, {out}/alpha-1: there already" in str(again)
    alone = run("--scores-only", "-o", str(tmp_path / "new")).exception
    assert isinstance(alone, ConfigError)
    assert "goes with --evaluate" in str(alone)


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


BESIDE = ("README.md", "LICENSE", "tokenizer.model", "chat.jinja", "code.py", "1_Pooling/config.json")
FOREIGN = (".env", "dataset.tar", "model.gguf", "data.npz", "anchor.bin", "notes.pdf", "out/scores.json")


@pytest.mark.parametrize("alone", [False, True])
def test_what_belongs_beside_the_weights(tmp_path: Path, ends, alone: bool) -> None:
    """Of a directory, and of a lone file beside a config.json: what a checkpoint's directory has, no more."""
    folder = Path(ends[1])
    for name in (
        *BESIDE,
        *FOREIGN,
        "onnx/config.json",
        "onnx/model.onnx",
        "runs/a/config.json",
        "pytorch_model.bin.index.json",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    end = folder / "model-0.safetensors" if alone else folder
    found = plan(ends[0], str(end))
    weights = {"model-0.safetensors"}
    if not alone:
        weights |= {"model-1.safetensors", "model.safetensors.index.json"}
    got = files_in(write(found, tmp_path / "mixed", 0.5))
    assert got == {*BESIDE, *weights, "config.json", "interpolation.json"}
    assert set(found.beside.left) >= {".env", "dataset.tar", "model.gguf", "onnx/", "runs/", "out/"}
    assert found.beside.left[-1] == ".env"


def test_nothing_is_taken_from_beside_a_lone_file(tmp_path: Path) -> None:
    """Whose directory is no checkpoint's."""
    home = tmp_path / "home"
    (home / "1_Pooling").mkdir(parents=True)
    save_file(second(), home / "ft.safetensors")
    for name in (".env", "dataset.tar", "notes.txt", "1_Pooling/config.json"):
        (home / name).write_text("{}")
    start = save(tmp_path / "first", first())
    done = CliRunner().invoke(
        app, ["interpolate", str(start), str(home / "ft.safetensors"), "-o", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.exception
    assert files_in(tmp_path / "out" / "alpha-0.5") == {"ft.safetensors", "interpolation.json"}
    assert "not taken from beside" in done.stderr
    assert "1_Pooling/, dataset.tar, notes.txt, .env" in done.stderr


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.complex64])
def test_kinds_that_are_not_mixed(tmp_path: Path, kind: torch.dtype) -> None:
    """Refused before anything is written; with keep they are copied, as are integers in any case."""
    odd = torch.arange(6).to(kind)
    name = {torch.float8_e4m3fn: "F8_E4M3", torch.complex64: "C64"}[kind]
    start = save(tmp_path / "start", {**first(), "odd": odd * 0 if kind.is_complex else odd})
    end = save(tmp_path / "end", {**second(), "odd": odd})
    with pytest.raises(AnchorError, match=rf"odd is {name}.*wanted one of F64.*--keep PATTERN"):
        plan(str(start), str(end))
    out = tmp_path / "out"
    refused = CliRunner().invoke(app, ["interpolate", str(start), str(end), "-o", str(out)])
    assert isinstance(refused.exception, AnchorError)
    assert not out.exists()
    got = everything(write(plan(str(start), str(end), keep=["od*"]), tmp_path / "mixed", 0.5))
    assert got["odd"].dtype == kind
    assert torch.equal(got["odd"].view(torch.uint8), odd.view(torch.uint8))
    assert torch.equal(got["steps"], second()["steps"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "names", [("lm_head.weight", "model.embed_tokens.weight"), ("wte.weight", "lm_head.weight")]
)
def test_tied_weights_under_two_names(tmp_path: Path, names: tuple[str, str], tied: bool) -> None:
    """They are one tensor where the configuration says so, else the line that names what stays names it."""
    a, b = first(), second()
    start = save(tmp_path / "start", {**a, names[0]: torch.zeros(8, 2)})
    end = save(tmp_path / "end", {**b, names[1]: torch.ones(8, 2)})
    (end / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    found = plan(str(start), str(end))
    assert (names[1] in found.kept) != tied
    assert (names[0] in found.left_out) != tied
    got = everything(write(found, tmp_path / "mixed", 0.25))[names[1]]
    assert torch.equal(got, torch.full((8, 2), 0.25 if tied else 1.0))


def test_remains_of_killed_commands(tmp_path: Path, ends) -> None:
    """What lies beside the target is cleared if its process is gone, or had this one's number."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    stale = [tmp_path / f".mixed.{pid}" for pid in (gone.pid, os.getpid())]
    others = [tmp_path / name for name in (f".mixed.{os.getppid()}", ".mixed.x", f".mixed.1.{gone.pid}")]
    for folder in (*stale, *others):
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
    write(plan(*ends), tmp_path / "mixed", 0.5)
    assert not any(folder.exists() for folder in stale)
    assert all(folder.exists() for folder in others)


def test_sigterm(tmp_path: Path, ends, monkeypatch) -> None:
    """Nothing stays of the checkpoint in work; the handler of before is put back."""
    read = work.read_piece

    def read_and_be_told_to_end(*args: Any, **more: Any) -> Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return read(*args, **more)

    monkeypatch.setattr(work, "read_piece", read_and_be_told_to_end)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        done = CliRunner().invoke(app, ["interpolate", *ends, "-o", str(tmp_path / "out")])
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done.exit_code == 143
    assert not any((tmp_path / "out").iterdir())
