"""A text classifier with a new head: metrics, a function of the user's, early stopping; and bad images."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.job.commands import environment, metrics, results
from tests.job.conftest import save_tiny_model
from tests.job.models import save_bert, sentences, write_lines
from tests.job.test_causal_lm import in_this_process, on_two_ranks
from tests.support.warm import python

METRIC = """
def share_of_cats(predictions, labels):
    assert predictions.shape == (len(labels), 2)
    return float((predictions.argmax(-1) == labels).double().mean())
"""

SCORE = """
import json, sys, torch
from sklearn.metrics import f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model, tokenizer = (
    kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForSequenceClassification, AutoTokenizer)
)
rows = [json.loads(line) for line in open(sys.argv[2])]
with torch.no_grad():
    said = [model(**tokenizer(r["text"], return_tensors="pt")).logits.argmax(-1).item() for r in rows]
known = [model.config.label2id[r["label"]] for r in rows]
print(100 * f1_score(known, said, average="macro"))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("texts")
    save_bert(home / "bert")
    for name, seed in (("train", 1), ("test", 2), ("validation", 3)):
        texts = sentences(61, seed=seed)
        rows = [{"text": text, "label": "cat" if "cat" in text else "none"} for text in texts]
        write_lines(home / f"{name}.jsonl", rows)
    (home / "mymetrics.py").write_text(METRIC)
    job = {
        "task": "sequence-classification",
        "checkpoint": str(home / "bert"),
        "data": {name: str(home / f"{name}.jsonl") for name in ("train", "test", "validation")},
        "device": "cpu",
        "metrics": ["f1", "accuracy", "mymetrics.share_of_cats"],
        "compare": ["adamw"],
        "train": {
            "epochs": 200,
            "batch_size": 32,
            "lr": 1e-2,
            "evaluate_every": 2,
            "early_stopping": {"patience": 3, "metric": "accuracy", "min_delta": 1.0},
        },
    }
    (home / "job.yaml").write_text(yaml.safe_dump(job))
    return home


def test_new_head_metrics_and_early_stopping(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(home))
    out = home / "out"
    in_this_process(home / "job.yaml", f"output_dir={out}")
    (trained,) = results(out)["trainings"]
    last = trained["history"][-1]
    scores = last["metrics"]["test"]
    assert list(scores) == ["f1", "accuracy", "mymetrics.share_of_cats"]
    assert 100 * scores["mymetrics.share_of_cats"] == pytest.approx(scores["accuracy"])
    assert last["scores"] == {"test": scores["f1"]}
    # Three evaluations in a row without a gain of a point end it; the one before them was the best.
    (stopped,) = metrics(out, "stopped early")
    seen = [entry["metrics"]["validation"]["accuracy"] for entry in trained["history"][1:]]
    assert stopped["step"] == last["step"] == 2 * len(seen) < 400
    assert max(seen[-3:]) < max(seen[:-3]) + 1
    done = subprocess.run(
        [python("job"), "-c", SCORE, trained["checkpoint"], str(home / "test.jsonl")],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) == pytest.approx(scores["f1"])


@pytest.mark.slow
def test_two_ranks_agree_with_one_and_on_what_is_wrong(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same new head and scores; a broken image that one rank alone decodes ends the job on both."""
    monkeypatch.setenv("PYTHONPATH", str(home))
    short = ["train.max_steps=4", "metrics=[accuracy]"]
    monkeypatch.syspath_prepend(str(home))
    in_this_process(home / "job.yaml", *short, f"output_dir={home / 'one'}")
    for index in range(12):
        name = ("dark", "bright")[index % 2]
        (home / "photos" / name).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 40 + 150 * (index % 2)).save(home / "photos" / name / f"{index}.png")
    (home / "photos" / "dark" / "4.png").write_bytes(b"no picture")
    job = {
        "checkpoint": str(save_tiny_model(home / "vit")),
        "classes": ["bright", "dark"],
        "data": {"train": str(home / "photos"), "test": str(home / "photos")},
        "device": "cpu",
        "compare": ["adamw"],
    }
    (home / "images.yaml").write_text(yaml.safe_dump(job))
    cases = {name: [f"engine={name}", *short] for name in ("fsdp2", "ddp")}
    cases["image"] = [str(home / "images.yaml"), "engine=fsdp2"]
    out = on_two_ranks(home, cases, "two")
    losses = [line["loss"] for line in metrics(home / "one", "step")]
    for name in ("fsdp2", "ddp"):
        assert [line["loss"] for line in metrics(out / name, "step")] == pytest.approx(losses, abs=1e-4)
        mine, theirs = (
            metrics(run, "evaluation")[-1]["metrics"]["test"] for run in (out / name, home / "one")
        )
        assert mine == pytest.approx(theirs)
    for rank in (0, 1):
        ended = json.loads((out / f"ended-{rank}.json").read_text())["image"]
        assert f"{home / 'photos' / 'dark' / '4.png'}: cannot be read as an image" in ended
