"""What a user gets wrong is one sentence and exit code 2, from the command that was typed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer.testing
from PIL import Image

from sharded_spd.cli import app as command
from tests.job.commands import finetune

Say = Callable[..., str]


@pytest.fixture
def say(
    tiny_job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path
) -> Say:
    """The error of the command with these settings, run in this process as far as it gets."""

    def run(*settings: str, job: Path | None = None) -> str:
        arguments = ["sharded-spd", "finetune", str(job or tiny_job), f"output_dir={home / 'bad'}", *settings]
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as exit_:
            command.main()
        assert exit_.value.code == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ")
        return text

    return run


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("train.lrr=1e-3", ["train.lrr: unknown key", "did you mean 'lr'"]),
        ("sed=1", ["sed: unknown key", "did you mean 'seeds'"]),
        ("train.lr=fast", ["train.lr", "a number", "'fast'"]),
        ("train.epochs=1.5", ["train.epochs", "a whole number", "1.5"]),
        ("train.epochs=0", ["train.epochs", "1 or more"]),
        ("train.lr", ["train.lr", "key=value"]),
        ("ranks.x=1", ["ranks", "a whole number"]),
        ("checkpoint.x=1", ["checkpoint", "no settings of its own"]),
        ("ranks=two", ["ranks", "a whole number"]),
        ("engine=fsdp", ["engine", "did you mean 'fsdp2'"]),
        ("engine.name=megatron", ["engine", "single, ddp, fsdp2, deepspeed"]),
        ("engine={name: fsdp2, reshard: true}", ["engine.reshard: unknown key", "reshard_after_forward"]),
        ("engine={name: fsdp2, param_dtype: float8}", ["engine.param_dtype", "bfloat16"]),
        ("engine={name: single, blocks: []}", ["engine.blocks: unknown key"]),
        ("ranks=2", ["single runs one rank", "ddp or fsdp2"]),
        ("task=image-clasification", ["task", "did you mean 'image-classification'"]),
        ("compare=[adamw, sdp]", ["sdp", "did you mean 'spd'"]),
        ("compare=[spd, spd]", ["compare", "none twice"]),
        ("spd.lambda=3", ["spd", "lambda: unknown key", "weight_decay"]),
        ("spd.weight_decay=-1", ["spd", "weight_decay", "0 or more"]),
        ("select.weight_decay.spd=[1, -1]", ["spd", "weight_decay", "-1"]),
        ("select.weight_decay.spdd=[1, 2]", ["spdd", "did you mean 'spd'"]),
        ("checkpoint=/nowhere/at/all", ["checkpoint", "no directory /nowhere/at/all"]),
        ("checkpoint=null", ["checkpoint", "pretrain"]),
        ("data=digit", ["data", "did you mean 'digits'"]),
        ("data.poool=3", ["data.poool: unknown key", "did you mean 'pool'"]),
        ("data.train=61", ["data.train", "pool of 60"]),
        ("spd.anchor=/nowhere.safetensors", ["/nowhere.safetensors"]),
        ("spd.layers=[{pattern: 'head.*', rule: decay}]", ["head.*"]),
        ("engine=@/nowhere.yaml", ["/nowhere.yaml", "cannot be read"]),
    ],
)
def test_settings(say: Say, setting: str, wanted: list[str]) -> None:
    text = say(setting)
    for part in wanted:
        assert part in text


def test_missing_file(say: Say, home: Path) -> None:
    assert "cannot be read" in say(job=home / "none.yaml")


def test_directory_that_is_no_checkpoint(say: Say, tmp_path: Path) -> None:
    assert "config.json" in say(f"checkpoint={tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    assert "safetensors" in say(f"checkpoint={tmp_path}")


@pytest.mark.parametrize(
    ("arrays", "wanted"),
    [
        (None, "there is no"),
        ({"images": np.zeros((3, 8, 8))}, "no array 'labels', only: images"),
        ({"images": np.zeros((3, 8, 8)), "labels": np.zeros(2, int)}, "one whole number per image"),
        ({"images": np.zeros((3, 8, 8)), "labels": np.array([0, 1, 10])}, "labels from 0 to 10"),
        ({"images": np.zeros((3, 9, 9)), "labels": np.zeros(3, int)}, "the model takes 1 x 8 x 8"),
        ({"images": np.full((3, 8, 8), 7.0), "labels": np.zeros(3, int)}, "values from 7 to 7"),
        ({"images": np.zeros((0, 8, 8)), "labels": np.zeros(0, int)}, "holds no images"),
    ],
)
def test_arrays(say: Say, tmp_path: Path, arrays: dict[str, np.ndarray] | None, wanted: str) -> None:
    file = tmp_path / "train.npz"
    if arrays is not None:
        np.savez(file, **arrays)
    text = say(f"data={{name: files, train: {file}, test: {file}}}", "compare=adamw")
    assert "data.train" in text
    assert str(file) in text
    assert wanted in text


def test_folder_with_another_class(say: Say, tmp_path: Path) -> None:
    for part, name in (("train", "dogs"), ("test", "dogs"), ("test", "cats")):
        (tmp_path / part / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / part / name / "1.png")
    sets = f"data={{name: files, train: {tmp_path / 'train'}, test: {tmp_path / 'test'}}}"
    text = say(sets, "compare=adamw")
    assert f"data.test: {tmp_path / 'test' / 'cats'}: the label 'cats' is none of the model's classes" in text


def test_choosing_without_a_validation_set(say: Say, tmp_path: Path) -> None:
    file = tmp_path / "train.npz"
    np.savez(file, images=np.zeros((3, 8, 8)), labels=np.zeros(3, int))
    text = say(f"data={{name: files, train: {file}, test: {file}}}", "select.weight_decay.spd=[1, 2]")
    assert "data.validation" in text


def test_command_line_speaks_plainly(tiny_job: Path, home: Path) -> None:
    """Found by the command itself, and found on the ranks: one message each."""
    at_once = finetune(str(tiny_job), "engine=fsdp3", "ranks=2", cache=home)
    assert (at_once.returncode, at_once.stdout) == (2, "")
    assert at_once.stderr.count("error:") == 1
    on_ranks = finetune(
        str(tiny_job), "engine=fsdp2", "ranks=2", "compare=spd", "spd.anchor=/none.safetensors", cache=home
    )
    assert on_ranks.returncode == 2
    assert on_ranks.stderr.count("/none.safetensors: no such file") == 1
    assert "Traceback" not in on_ranks.stderr + at_once.stderr


def test_help_names_the_settings() -> None:
    shown = typer.testing.CliRunner().invoke(command.app, ["finetune", "--help"])
    assert shown.exit_code == 0
    assert "quickstart" in shown.output


@pytest.mark.parametrize("arguments", [["finetun"], ["finetune", "--rank", "2"]])
def test_unknown_commands_and_options(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["sharded-spd", *arguments])
    with pytest.raises(SystemExit) as exit_:
        command.main()
    assert exit_.value.code == 2
