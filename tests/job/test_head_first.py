"""The head is trained alone, then everything from there."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.job.commands import ROOT, finetune, finished, metrics, results

HEAD = ("head_first={epochs: 3, batch_size: 25, lr: 0.01, schedule: cosine}", "seeds=[0, 1]")
ZERO = ROOT / "configs" / "deepspeed"
STILL = ("train.lr=0", "train.adamw_weight_decay=0")
"""What comes out is what the second part began with."""


def heads(run: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(run / "heads" / f"seed{seed}.safetensors") for seed in (0, 1)]


@pytest.fixture(scope="module")
def alone(home: Path, tiny_job: Path) -> Path:
    finished(str(tiny_job), *HEAD, *STILL, "compare=[adamw]", f"output_dir={home / 'alone'}", cache=home)
    return home / "alone"


def test_only_the_head_moves(alone: Path, checkpoint: Path) -> None:
    """The weights that the second part starts from are the checkpoint's, but for the head, by seed."""
    start = load_file(checkpoint / "model.safetensors")
    trained = heads(alone)
    assert set(trained[0]) == {"classifier.weight", "classifier.bias"}
    assert not torch.equal(trained[0]["classifier.weight"], trained[1]["classifier.weight"])
    for seed, head in enumerate(trained):
        end = load_file(alone / "checkpoints" / f"adamw-seed{seed}" / "model.safetensors")
        assert end.keys() == start.keys()
        for name, tensor in end.items():
            assert torch.equal(tensor, head.get(name, start[name])), name
            assert (name in head) != torch.equal(tensor, start[name]), name
    losses = [line["loss"] for line in metrics(alone, "head") if line["seed"] == 0]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    for run in results(alone)["trainings"]:
        assert run["history"][0]["scores"] == run["history"][-1]["scores"]
        assert run["deviation"] == 0


def anchored(home: Path, tiny_job: Path, name: str, *settings: str) -> Path:
    """A training whose head is anchored too, at what it was when everything began to be trained."""
    to = home / name
    spd = ("compare=[spd]", "spd={weight_decay: 0.5, max_pull: 1.0, anchor_missing: raise}")
    finished(str(tiny_job), *HEAD, *spd, f"output_dir={to}", *settings, cache=home)
    return to


@pytest.mark.parametrize(
    "engine",
    [
        "fsdp2",
        pytest.param("fsdp1", marks=pytest.mark.slow),
        pytest.param("ddp", marks=pytest.mark.slow),
        pytest.param("zero-redundancy", marks=pytest.mark.slow),
        pytest.param(f"{{name: deepspeed, config: {ZERO}/zero3.json}}", marks=pytest.mark.slow),
        pytest.param(f"{{name: deepspeed, config: {ZERO}/zero1.json}}", marks=pytest.mark.slow),
    ],
)
def test_engines(home: Path, tiny_job: Path, alone: Path, engine: str, tmp_path: Path) -> None:
    """The same head and the same training on two ranks, whose shards are read where the engine can."""
    run = anchored(home, tiny_job, f"two-{tmp_path.name}", f"engine={engine}", "ranks=2")
    for one, two in zip(heads(alone), heads(run), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    if not (home / "one").exists():
        anchored(home, tiny_job, "one")
    for one, two in zip(results(home / "one")["trainings"], results(run)["trainings"], strict=True):
        assert two["deviation"] == pytest.approx(one["deviation"], rel=1e-3)
        assert 0 < one["deviation"] < 0.2


def test_refused(home: Path, tiny_job: Path) -> None:
    done = finetune(str(tiny_job), HEAD[0], "lora={r: 2}", cache=home)
    assert done.returncode == 2
    assert "head_first: is for full fine-tuning" in done.stderr
    flat = finetune(
        str(tiny_job), HEAD[0], "engine={name: fsdp1, use_orig_params: false}", "ranks=2", cache=home
    )
    assert flat.returncode == 2
    assert "head_first: engine fsdp1 has frozen layers in one flat parameter with others" in flat.stderr
