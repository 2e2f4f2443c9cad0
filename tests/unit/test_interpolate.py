"""Checkpoints between two others: their values, their files, what is refused, and the command."""

from __future__ import annotations

import json
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

from sharded_spd.anchors import interpolate as work
from sharded_spd.anchors.alphas import parse_alphas
from sharded_spd.anchors.interpolate import plan, write
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


@pytest.mark.parametrize(
    "text",
    ["", "a", "0:1", "0:1:0", "0:1:-1", "1:0:0.1", "0,0", "nan", "0:inf:1", "0:1:1e-9", "1,,2", "0:1:1:1"],
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
