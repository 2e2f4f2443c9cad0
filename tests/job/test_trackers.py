"""What a run hands to tracking libraries, read back with the libraries themselves, and its report."""

from __future__ import annotations

import importlib.util
import json
import struct
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sharded_spd.cli.app import app
from sharded_spd.errors import ConfigError
from sharded_spd.finetune.config import JSONL, TRACKERS, JobConfig, NamedBlock
from sharded_spd.finetune.report import trackers, tracking
from sharded_spd.finetune.report.history import read_history
from sharded_spd.finetune.report.page import write_report
from sharded_spd.finetune.report.records import Recorder
from sharded_spd.finetune.report.tracking import Tracking, left_behind
from tests.job.commands import finetune, finished

TAGS = {"purpose": "compare", "method": "spd", "weight_decay": 2.0, "seed": 0}
TITLE = "spd λ=2 seed 0"
EVIL = "<script>alert(1)</script>"


def write_steps(recorder: Recorder, steps: range, *, loss: float = 1.0) -> None:
    for step in steps:
        figures = {"loss": loss / step, "lr": 0.1, "activation_rate": 0.5, "deviation": 0.01 * step}
        recorder.write("step", **TAGS, step=step, steps=9, epoch=step / 3, samples_per_second=5.0, **figures)
        layers = {f"{EVIL}.{n}": {"deviation": 1.0, "deviation_rel": 0.1 * n, "s": n % 2} for n in range(4)}
        recorder.write("layers", **TAGS, step=step, epoch=step / 3, layers=layers)
    found = {"test": {"accuracy": 80.0 + steps[-1]}, "noise": {"accuracy": 50.0}}
    scores = {name: own["accuracy"] for name, own in found.items()}
    recorder.write("evaluation", **TAGS, step=steps[-1], epoch=1.0, scores=scores, metrics=found)


def begin(directory: Path, *names: str) -> Recorder:
    return Recorder(directory, Tracking(names, directory, {"task": EVIL, "train": {"lr": 0.1}}))


def run_and_resume(directory: Path, name: str) -> None:
    """Five steps, a stop, and again from step 3 to 6 with another loss."""
    first = begin(directory, "jsonl", name)
    zero = {"test": {"accuracy": 10.0}}
    first.write("zero-shot", seed=0, scores={"test": 10.0, "noise": 9.0}, metrics=zero)
    write_steps(first, range(1, 6))
    first.close()
    if name == "wandb":
        time.sleep(1.1)  # its folders are named by the second
    second = begin(directory, name)
    second.write("resumed", **TAGS, step=3)
    write_steps(second, range(4, 7), loss=100.0)
    second.write("trained", **TAGS, activation_rate=0.5, deviation=0.06, samples_per_second=5.0, seconds=1.0)
    second.close()


LOSSES = [1.0, 1 / 2, 1 / 3, 100 / 4, 100 / 5, 100 / 6]


def test_a_job_may_name_every_tracker_there_is() -> None:
    assert TRACKERS == (JSONL, *trackers.TRACKERS)


def test_tensorboard_reads_what_was_written_and_a_resumed_run_replaces_steps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_and_resume(tmp_path, "tensorboard")
    (folder,) = (tmp_path / "tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    losses = events.Scalars("train/loss")
    assert [e.step for e in losses] == [1, 2, 3, 4, 5, 6]
    assert [e.value for e in losses] == pytest.approx(LOSSES)
    assert [(e.step, e.value) for e in events.Scalars("eval/test/accuracy")] == [(0, 10.0), (6, 86.0)]
    assert {"train/lr", "train/activation_rate", "train/deviation", "eval/noise/accuracy"} <= {
        *events.Tags()["scalars"]
    }


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs the extra mlflow")
def test_mlflow_reads_what_was_written_and_a_resumed_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_and_resume(tmp_path, "mlflow")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("sharded_spd")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == TITLE
    assert run.info.status == "FINISHED"
    assert run.data.params["train.lr"] == "0.1"
    written = client.get_metric_history(run.info.run_id, "train/loss")
    last = {m.step: m.value for m in sorted(written, key=lambda m: m.timestamp)}
    assert [last[step] for step in sorted(last)] == pytest.approx(LOSSES)
    assert run.data.metrics["eval/test/accuracy"] == 86.0


def wandb_records(content: bytes) -> Iterator[bytes]:
    """LevelDB's log format behind a header of 7 bytes: blocks of 32 KiB, records of crc, length and type."""
    at, held = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        held += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield held
            held = b""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the extra wandb")
def test_wandb_writes_offline_and_a_resumed_run_keeps_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_and_resume(tmp_path, "wandb")
    from wandb.proto import wandb_internal_pb2

    losses, names = {}, set()
    for file in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime):
        for data in wandb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.run.run_id:
                names.add((record.run.run_id, record.run.display_name))
            items = record.history.item
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            if "train/loss" in row:
                losses[row["step"]] = row["train/loss"]
    assert [losses[step] for step in sorted(losses)] == pytest.approx(LOSSES)
    assert len(names) == 1
    assert names.pop()[1] == TITLE


def test_a_tracker_that_fails_warns_once_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.tensorboard.writer import SummaryWriter

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "flush", full)
    recorder = begin(tmp_path, "tensorboard")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        write_steps(recorder, range(1, 4))
        recorder.close()
    assert [str(w.message) for w in seen if "No space left" in str(w.message)] == [str(seen[0].message)]
    assert "track: tensorboard failed" in str(seen[0].message)
    assert sorted(read_history(tmp_path).courses[0].steps) == [1, 2, 3]


class Stuck:
    """A library that waits for a server."""

    def __init__(self, *_: Any) -> None:
        self.answered = threading.Event()
        ANSWERS.append(self.answered)

    def log(self, step: int, values: Any) -> None:
        self.answered.wait(60)

    def close(self) -> None:
        return


ANSWERS: list[threading.Event] = []


def let_go() -> None:
    """The server answers: the threads that waited for it end."""
    for answered in ANSWERS:
        answered.set()
    deadline = time.monotonic() + 10
    while left_behind() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left_behind()


def test_a_tracker_that_does_not_answer_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Stuck)
    recorder = begin(tmp_path, "wandb", "tensorboard")
    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        write_steps(recorder, range(1, 101))
        recorder.close(patience=1.0)
    assert time.perf_counter() - began < 20
    told = [str(w.message) for w in seen if "track:" in str(w.message)]
    assert len(told) == 1
    assert "track: wandb does not answer (100 events wait)" in told[0]
    assert sorted(read_history(tmp_path).courses[0].steps) == [*range(1, 101)]
    assert left_behind()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (tmp_path / "tensorboard").iterdir()
    assert len(EventAccumulator(str(folder)).Reload().Scalars("train/loss")) == 100
    let_go()


def test_a_full_queue_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Stuck)
    monkeypatch.setattr(tracking, "HELD", 5)
    recorder = begin(tmp_path, "wandb")
    with pytest.warns(UserWarning, match="track: wandb has not taken 5 events") as seen:
        write_steps(recorder, range(1, 30))
    recorder.close(patience=0.0)
    assert len(seen) == 1
    let_go()


def test_a_run_again_keeps_each_step_once(tmp_path: Path) -> None:
    """A line that was broken off is taken out, too; other trainings stay."""
    first = begin(tmp_path, "jsonl")
    write_steps(first, range(1, 6))
    first.write("step", **{**TAGS, "method": "adamw"}, step=5)
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"event": "step", "sec')
    second = begin(tmp_path, "jsonl")
    second.forget(TAGS, after=3)
    write_steps(second, range(4, 7), loss=100.0)
    second.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step" and line["method"] == "spd"]
    assert [line["loss"] for line in steps] == pytest.approx(LOSSES)
    assert [line["step"] for line in lines if line["event"] == "evaluation"] == [6]
    assert [line["method"] for line in lines].count("adamw") == 1
    assert read_history(tmp_path).damaged == 0


def test_unknown_names_and_missing_libraries_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"):
        JobConfig(data=NamedBlock(name="digits"), checkpoint="x", track=("tensorbord",))
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'sharded_spd\[wandb\]'"):
        trackers.check_trackers(["jsonl", "wandb"])


def test_the_report_of_a_broken_off_run_escapes_and_needs_no_network(tmp_path: Path) -> None:
    directory = tmp_path / "a & <b>"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"task": EVIL, "checkpoint": f'"{EVIL}'}))
    recorder = begin(directory, "jsonl")
    recorder.write("zero-shot", seed=0, scores={"test": 10.0, "noise": 9.0}, metrics={})
    write_steps(recorder, range(1, 4))
    recorder.write("warning", text=EVIL)
    recorder.close()
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"event": "step", "sec')
    done = CliRunner().invoke(app, ["report", str(directory)])
    assert done.exit_code == 0, done.output
    page = (directory / "report.html").read_text()
    assert EVIL not in page
    assert "a &amp; &lt;b&gt;" in page
    assert "http" not in page
    assert page.count("data:image/png;base64,") == 4
    for text in ("zero-shot", "83.0", "did not finish", "1 line(s)", "broken off"):
        assert text in page


def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run"):
        write_report(tmp_path)


@pytest.mark.slow
def test_the_command_tracks_and_reports(home: Path, tiny_job: Path) -> None:
    torch.manual_seed(0)
    run = home / "tracked"
    printed = finished(str(tiny_job), f"output_dir={run}", "track=[jsonl,tensorboard]", cache=home)
    assert "report.html" in printed.replace("\n", "")
    history = read_history(run)
    assert history.end is not None
    assert history.seconds == history.end["seconds"]
    assert [c.title for c in history.compared()] == ["adamw seed 0", TITLE]
    assert history.compared()[1].layers
    assert {f.name for f in (run / "tensorboard").iterdir()} == {"adamw_seed_0", "spd_λ=2_seed_0"}
    assert "zero-shot" in (run / "report.html").read_text()
    wrong = finetune(str(tiny_job), "track=mlfow", cache=home)
    assert wrong.returncode == 2
    assert "did you mean 'mlflow'" in wrong.stderr
