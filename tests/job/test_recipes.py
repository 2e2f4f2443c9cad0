"""The built-in recipe cut down to seconds, and a user's own files with a new head."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from sharded_spd.finetune.config import load_job
from tests.job.commands import ROOT, finished, metrics, results

SHORT = [
    "ranks=1",
    "engine=single",
    "pretrain.engine=single",
    "pretrain.train.epochs=1",
    "pretrain.min_accuracy=0",
    "train.epochs=1",
    "train.evaluations=1",
    "seeds=[0, 1]",
    "select.weight_decay.spd=[1, 2]",
]


def test_quickstart_pretrains_once_chooses_and_compares(home: Path) -> None:
    out = home / "quick"
    text = finished(*SHORT, f"output_dir={out}", cache=home)  # no file named: the built-in recipe
    assert "Pre-training a vit" in text
    trained = results(out)["trainings"]
    assert [(t["method"], t["seed"]) for t in trained] == [("adamw", 0), ("spd", 0), ("adamw", 1), ("spd", 1)]
    assert len(trained[0]["history"][0]["scores"]) == 8
    (chosen,) = metrics(out, "selected")
    assert {t["weight_decay"] for t in trained} == {None, chosen["weight_decay"]}
    assert {strength: len(scores) for strength, scores in chosen["validation"].items()} == {
        "1.0": 1,
        "2.0": 1,
    }
    assert not [e for e in metrics(out, "evaluation") if e["purpose"] == "select"]  # tests play no part in it
    assert "± " in text

    again = finished(*SHORT, f"output_dir={out}", cache=home)
    assert "made by an earlier run" in again
    losses = [[s["loss"] for s in metrics(run, "step")] for run in (out, out.with_name("quick-2"))]
    assert losses[0] == losses[1]


@pytest.fixture
def own_files(tmp_path: Path) -> Path:
    """Dark and bright images in two classes: as arrays, as safetensors, and as a folder."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    pixels = torch.rand(40, 8, 8, generator=generator) * 0.4 + 0.6 * labels.view(-1, 1, 1)
    np.savez(tmp_path / "train.npz", images=(pixels * 255).to(torch.uint8).numpy(), labels=labels.numpy())
    save_file({"images": pixels.unsqueeze(1), "labels": labels}, tmp_path / "test.safetensors")
    for index in range(6):
        name = ("dark", "bright")[int(labels[index])]
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((pixels[index] * 255).to(torch.uint8).numpy()).resize((20, 20))
        picture.save(tmp_path / "photos" / name / f"{index}.png")
    return tmp_path


def test_own_files_and_a_new_head(own_files: Path, checkpoint: Path, home: Path) -> None:
    job = {
        "checkpoint": str(checkpoint),
        "classes": ["dark", "bright"],
        "data": {
            "name": "files",
            "train": str(own_files / "train.npz"),
            "test": str(own_files / "test.safetensors"),
            "ood": {"photos": str(own_files / "photos")},
        },
        "device": "cpu",
        "train": {"epochs": 10, "batch_size": 8, "lr": 1e-2, "evaluations": 2, "schedule": "cosine"},
    }
    (own_files / "job.yaml").write_text(yaml.safe_dump(job))
    out = own_files / "out"
    rule = "spd=@" + str(ROOT / "configs" / "rules" / "spd_new_head.yaml")
    text = finished(str(own_files / "job.yaml"), rule, f"output_dir={out}", cache=home)
    assert "photos" in text
    (spd,) = results(out)["trainings"]
    assert spd["history"][-1]["scores"] == {"test": 100.0, "photos": 100.0}
    model = AutoModelForImageClassification.from_pretrained(spd["checkpoint"])
    assert model.config.id2label == {0: "dark", 1: "bright"}
    before, after = (load_file(path / "model.safetensors") for path in (checkpoint, Path(spd["checkpoint"])))
    assert before.keys() == after.keys()  # stored under the names that the checkpoint came with
    assert after["classifier.weight"].shape == (2, 16)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "engines").glob("*.yaml")), ids=lambda p: p.stem)
def test_engine_files_load(path: Path) -> None:
    job = load_job(ROOT / "configs" / "recipes" / "quickstart.yaml", [f"engine=@{path}"])
    assert job.engine.name == path.stem


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "rules").glob("*.yaml")), ids=lambda p: p.stem)
def test_rule_files_load(path: Path) -> None:
    job = load_job(ROOT / "configs" / "recipes" / "quickstart.yaml", [f"spd=@{path}", "compare=[]"])
    (method,) = job.compare
    assert job.spd_config(method).rule == yaml.safe_load(path.read_text())["rule"]
