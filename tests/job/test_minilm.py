"""The recipe on the standard library's docstrings: what an encoder retains, beside ID and OOD."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from sharded_spd.finetune.data.docstring_source import DocstringOptions, deal, pairs
from sharded_spd.finetune.tasks.checkpoint import check_checkpoint
from tests.job.commands import ROOT, finished, metrics, results
from tests.job.models import save_bert
from tests.job.test_causal_lm import engine_setting, in_this_process

RECIPE = ROOT / "configs" / "recipes" / "minilm.yaml"
SIZES = {"train": 24, "validation": 16, "test": 50, "pool": 20}
PACKAGES = ("http", "logging")
SHORT = [
    f"data.packages=[{', '.join(PACKAGES)}]",
    *(f"data.{name}={size}" for name, size in SIZES.items()),
    "data.max_length=40",
    "spd.anchor=checkpoint",  # the fingerprint is the real model's
    "train.precision=float32",
    "head_first.precision=float32",
    "head_first.max_steps=2",
    "train.max_steps=2",
    "train.batch_size=8",
    "seeds=[0]",
    "compare=[adamw, spd]",
    "select.weight_decay={}",
]


def found_by_cosine(directory: Path, options: DocstringOptions) -> float:
    """The share of docstrings whose own name is the nearest, in percent: one text at a time, no padding."""
    model, tokenizer = AutoModel.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)

    def vector(text: str) -> torch.Tensor:
        ids = tokenizer(text, truncation=True, max_length=options.max_length).input_ids
        with torch.no_grad():
            every = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        mean = every.sum(0) / len(ids)
        return mean / mean.square().sum().sqrt()

    known = [(vector(text), vector(name)) for text, name in pairs(deal(options).test)]
    right = asked = 0
    for start in range(0, len(known) - options.pool + 1, options.pool):
        pool = known[start : start + options.pool]
        for at, (text, _) in enumerate(pool):
            cosines = [float(text @ name) for _, name in pool]
            right += cosines.index(max(cosines)) == at
            asked += 1
    return 100 * right / asked


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("minilm") / "bert")


def test_recipe_reports_what_is_retained(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    settings = [*SHORT, f"checkpoint={bert}", f"output_dir={out}", "train.lr=1e-2", "save=all"]
    in_this_process(RECIPE, *settings, "compare=[spd]")
    text = capsys.readouterr().out
    assert "retained: name" in text
    assert "retained: name, accuracy in %" in (out / "report.html").read_text()
    options = DocstringOptions(packages=PACKAGES, max_length=40, **SIZES)
    (zero_shot,) = metrics(out, "zero-shot")
    assert zero_shot["retained"]["name"] == pytest.approx(found_by_cosine(bert, options))
    (trained,) = results(out)["trainings"]
    first, last = trained["history"][0], trained["history"][-1]
    assert first["retained"] == zero_shot["retained"]
    assert set(last["scores"]) == {"test", "typing errors", "first sentence", "code"}
    after = found_by_cosine(Path(trained["checkpoint"]), options)
    assert last["retained"]["name"] == pytest.approx(after)
    assert 0 < trained["deviation"] < 1
    summary = results(out)["summary"]
    assert summary["zero-shot"]["retained"]["name"]["mean"] == zero_shot["retained"]["name"]


def test_recipe_describes_its_anchor(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The anchor is the checkpoint's file; the new head, which is not in it, has none."""
    in_this_process(RECIPE, *SHORT, f"checkpoint={bert}", f"output_dir={tmp_path / 'out'}", "--dry-run")
    text = capsys.readouterr().out
    anchor = next(line for line in text.splitlines() if line.startswith("anchor:"))
    assert f"the file {bert / 'model.safetensors'}" in anchor
    assert anchor.endswith("not in it: classifier.bias, classifier.weight")
    assert "2 of 8 examples" in text


@pytest.mark.slow
def test_every_engine_retains_the_same(bert: Path, tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    engines = {
        "one": [],
        "fsdp2": ["engine=fsdp2", "ranks=2"],
        "fsdp1": ["engine=fsdp1", "ranks=2"],
        "zero2": [engine_setting("zero2"), "ranks=2"],
        "zero3": [engine_setting("zero3"), "ranks=2"],
    }
    for name, settings in engines.items():
        out = tmp_path / name
        moving = [f"checkpoint={bert}", "train.lr=1e-2", "train.max_steps=6", f"output_dir={out}"]
        finished(str(RECIPE), *SHORT, *moving, *settings, cache=tmp_path)
        found[name] = [t["history"][-1] for t in results(out)["trainings"]]
    for name in engines:
        for one, other in zip(found["one"], found[name], strict=True):
            assert one["retained"] == other["retained"], name
            assert one["scores"] == other["scores"], name


@pytest.mark.slow
def test_the_real_model_before_training(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2 finds names as with sentence-transformers' pooling; its anchor has the fingerprint."""
    out = tmp_path / "out"
    real = [setting for setting in SHORT if not setting.startswith("spd.anchor")]
    text = finished(str(RECIPE), *real, "train.max_steps=1", f"output_dir={out}", cache=tmp_path)
    assert "retained: name" in text
    options = DocstringOptions(packages=PACKAGES, max_length=40, **SIZES)
    directory = check_checkpoint(json.loads((out / "config.json").read_text())["checkpoint"])
    expected = found_by_cosine(directory, options)
    assert expected > 40  # of 20 names: chance is 5
    (zero_shot,) = metrics(out, "zero-shot")
    assert zero_shot["retained"]["name"] == pytest.approx(expected)
