"""Checkpoints between the start and the end of a training, scored on the job's sets."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForImageClassification
from typer.testing import CliRunner

from sharded_spd.cli.app import app
from sharded_spd.errors import AnchorError, ConfigError
from sharded_spd.finetune.run.score import Scorer
from tests.job.commands import finished, results
from tests.job.conftest import save_tiny_model


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


@pytest.fixture
def ends(tmp_path: Path, checkpoint: Path) -> list[str]:
    """Two models of one architecture."""
    return [str(checkpoint), str(save_tiny_model(tmp_path / "end", seed=1))]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["interpolate", *arguments])


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "scores.json").read_text())


def test_scores_before_an_error_stay(ends, tiny_job: Path, tmp_path: Path, monkeypatch) -> None:
    """And the same command then goes on: with the checkpoints that are there whole, into the same scores."""
    out, score, seen = tmp_path / "out", Scorer.score, []

    def fail_at_the_third(self: Scorer, folder: Path) -> Any:
        seen.append(folder.name)
        if len(seen) == 3:
            raise AnchorError("no memory")
        return score(self, folder)

    monkeypatch.setattr(Scorer, "score", fail_at_the_third)
    command = [*ends, "-o", str(out), "--evaluate", str(tiny_job)]
    done = run(*command, "--alpha", "0,0.5,1")
    assert isinstance(done.exception, AnchorError)
    assert [row["alpha"] for row in read(out)["scores"]] == [0, 0.5]
    assert (out / "id_ood.png").stat().st_size > 1000
    before = (out / "alpha-0.5" / "model.safetensors").stat().st_mtime_ns
    done = run(*command, "--alpha", "0.5,1,-0.5", "eval_batch_size=100")
    assert done.exit_code == 0, done.exception
    assert (out / "alpha-0.5" / "model.safetensors").stat().st_mtime_ns == before
    assert [row["alpha"] for row in read(out)["scores"]] == [-0.5, 0, 0.5, 1]
    assert not list(out.glob(".*"))


def test_scores_of_something_else_are_not_mixed(ends, tiny_job: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    base = ["-o", str(out), "--evaluate", str(tiny_job), "--scores-only", "--alpha"]
    assert run(*ends, *base, "0").exit_code == 0
    before = (out / "scores.json").read_bytes()
    for more, what in (
        (["data.validation=30"], "job.data.options.validation"),
        (["seeds=[3]"], "job.seeds"),
        (["--keep", "classifier.*"], "keep"),
    ):
        refused = run(*ends, *base, "1", *more).exception
        assert isinstance(refused, ConfigError), refused
        assert f"scores of something else: {what} differ" in str(refused)
    swapped = run(*ends[::-1], *base, "1").exception
    assert isinstance(swapped, ConfigError)
    assert "start, end, start_files, end_files differ" in str(swapped)
    assert (out / "scores.json").read_bytes() == before
    assert {p.name for p in out.iterdir()} == {"scores.json", "id_ood.png"}
    (out / "scores.json").write_text('{"metric": "accuracy", "scores": []}')
    assert "start, end, keep" in str(run(*ends, *base, "1").exception)
    (out / "scores.json").write_text("[")
    assert "is not what this command writes" in str(run(*ends, *base, "1").exception)


def test_another_checkpoint_is_not_reused(ends, tiny_job: Path, tmp_path: Path) -> None:
    """Other ends, other values of the same end, or a file that was changed: refused as without --evaluate."""
    out = tmp_path / "out"
    base = ["-o", str(out), "--evaluate", str(tiny_job), "--alpha", "0.5"]
    assert run(*ends, "-o", str(out)).exit_code == 0
    assert isinstance(run(*ends, "-o", str(out)).exception, ConfigError)
    assert "there already" in str(run(*ends[::-1], *base).exception)
    assert "there already" in str(run(*ends, *base, "--keep", "classifier.*").exception)
    assert run(*ends, *base).exit_code == 0
    save_tiny_model(Path(ends[1]), seed=2)
    assert "there already" in str(run(*ends, *base).exception)
    fresh = [*base[2:], "-o", str(tmp_path / "fresh")]
    assert run(*ends, *fresh).exit_code == 0
    weights = tmp_path / "fresh" / "alpha-0.5" / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert "there already" in str(run(*ends, *fresh).exception)


def test_a_wrong_job_costs_nothing(ends, tiny_job: Path, tmp_path: Path) -> None:
    """Data and metrics are looked at before the first checkpoint is written."""
    job = yaml.safe_load(tiny_job.read_text())
    job["data"] = {"train": str(tmp_path / "nowhere"), "test": str(tmp_path / "nowhere")}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    out = tmp_path / "out"
    for path, more in ((tmp_path / "job.yaml", []), (tiny_job, ["metrics=[nonsense]"])):
        done = run(*ends, "-o", str(out), "--evaluate", str(path), *more)
        assert isinstance(done.exception, ConfigError), done.exception
        assert not out.exists()
