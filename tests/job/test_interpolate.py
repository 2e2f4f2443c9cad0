"""Checkpoints between the start and the end of a training, scored on the job's sets."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForImageClassification
from typer.testing import CliRunner

from sharded_spd.cli.app import app
from tests.job.commands import finished, results


def test_scores_between_start_and_end(home: Path, checkpoint: Path, tiny_job: Path, tmp_path: Path) -> None:
    """Alpha 0 scores as zero-shot did, 1 as the end of training; what lies between loads."""
    finished(str(tiny_job), "compare=[adamw]", f"output_dir={tmp_path / 'run'}", cache=home)
    (run,) = results(tmp_path / "run")["trainings"]
    out = tmp_path / "out"
    command = ["interpolate", str(checkpoint), run["checkpoint"], "--alpha", "0:1:0.5", "-o", str(out)]
    done = CliRunner().invoke(app, [*command, "--evaluate", str(tiny_job), "ranks=1"])
    assert done.exit_code == 0, (done.exception, done.output)
    found = json.loads((out / "scores.json").read_text())
    assert [row["alpha"] for row in found["scores"]] == [0, 0.5, 1]
    for row, end in zip(found["scores"][::2], (run["history"][0], run["history"][-1]), strict=True):
        assert row["scores"] == pytest.approx(end["scores"])
        assert "validation" in row["metrics"]
    assert f"{found['scores'][1]['scores']['test']:.1f}" in done.stdout
    assert (out / "id_ood.png").stat().st_size > 1000
    AutoModelForImageClassification.from_pretrained(out / "alpha-0.5")

    only = ["-o", str(tmp_path / "only"), "--evaluate", str(tiny_job), "--scores-only"]
    done = CliRunner().invoke(app, [*command[:3], "--alpha", "0.5", *only])
    assert done.exit_code == 0, done.exception
    assert {p.name for p in (tmp_path / "only").iterdir()} == {"scores.json", "id_ood.png"}
    again = json.loads((tmp_path / "only" / "scores.json").read_text())
    assert again["scores"] == found["scores"][1:2]
