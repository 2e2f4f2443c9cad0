"""One training of the benchmark, in this process: what came out of it, as JSON has it."""

from __future__ import annotations

import math
import shutil
import statistics
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.robustness import language, variants
from benchmarks.robustness.methods import ADAMW, ALPHAS, LR_FACTORS, LR_TIMES, WISE, by_name
from benchmarks.robustness.settings import Setting
from sharded_spd.anchors.tools import interpolate
from sharded_spd.finetune.config import JobConfig, load_job
from sharded_spd.finetune.report.records import Recorder
from sharded_spd.finetune.run.job import quiet_libraries, run_job
from sharded_spd.finetune.run.methods import Method
from sharded_spd.finetune.run.pretrain import cached_checkpoint, make_checkpoint
from sharded_spd.finetune.run.progress import Display
from sharded_spd.finetune.run.resume import Progress
from sharded_spd.finetune.run.score import Scorer
from sharded_spd.finetune.run.training import Trainer
from sharded_spd.finetune.tasks.checkpoint import check_checkpoint
from sharded_spd.finetune.tasks.registry import make_task
from sharded_spd.finetune.world import StopRequest, World
from sharded_spd.safetensors_io.reader import read_piece
from sharded_spd.sharding.layout import FlatRange

PRETRAIN_STEPS = 600

__all__ = ["PRETRAIN_STEPS", "Task", "prepare", "run", "variants"]


@dataclass(frozen=True)
class Task:
    """A training: the setting, the method, its candidate, a seed; `tune`: only the validation set counts.

    `of`: the candidate of AdamW whose learning rate it has. WiSE-FT's own candidate is one of `ALPHAS`.
    """

    setting: str
    method: str
    candidate: int
    seed: int
    tune: bool
    of: int = 0

    @property
    def key(self) -> str:
        """Its name in the file of results."""
        kind = "tune" if self.tune else "final"
        return f"{self.setting} {self.method} {self.candidate} {self.seed} {kind}"


def settings_of(task: Task, setting: Setting) -> list[str]:
    """What the job of a task is told beside the paths: two tasks alike in this are one training."""
    if task.method == WISE:
        return [*settings_of(weights_of(task), setting), f"alpha={ALPHAS[task.candidate]:g}"]
    method = by_name(task.method)
    settings = [*setting.overrides, f"compare=[{method.rule}]", *method.settings]
    if method.rule != "adamw":
        settings.append(f"spd.rule={method.rule}")
    if method.name == "LP-FT":
        settings += [f"head_first.lr={setting.head_lr:g}", "head_first.batch_size=40"]
    return settings + _settled(setting, method.candidates[task.candidate], task.of)


def weights_of(task: Task) -> Task:
    """The training of AdamW whose weights a task of WiSE-FT takes."""
    return replace(task, method=ADAMW, candidate=task.of)


def scratch(task: Task, setting: Setting) -> str:
    """The name of a task's folder."""
    told = zlib.crc32("\n".join(settings_of(task, setting)).encode())
    return f"{task.key.replace(' ', '-')}-{told:08x}"


def prepare(setting: Setting, folder: Path, *, steps: int = PRETRAIN_STEPS) -> list[str]:
    """Make or find the pre-trained checkpoint; the settings that name it and its data."""
    quiet_libraries()
    if setting.text_model:
        return _prepare_text(setting, folder, steps)
    config = load_job(setting.recipe, setting.overrides)
    pretrain = config.pretrain
    if pretrain is None:
        return []
    path = cached_checkpoint(config, pretrain, ranks=1)
    if not (path / "config.json").is_file():
        alone, task = _alone(), make_task(config, torch.device("cpu"))
        make_checkpoint(
            config, pretrain, task, to=path, world=alone, stop=StopRequest(), on_step=lambda report: None
        )
    return ["pretrain=null", f"checkpoint={path}"]


def _prepare_text(setting: Setting, folder: Path, steps: int) -> list[str]:
    done = folder / "pretraining" / "checkpoints" / "adamw-seed0"
    if not (done / "config.json").is_file():
        language.write_data(folder)
        language.write_model(folder / "random")
        run_job(load_job(setting.recipe, language.pretrain_settings(folder, steps)))
    data = [f"data.{part}={folder / f'code-{part}.jsonl'}" for part in language.PARTS]
    return [f"checkpoint={done}", *data, f"data.ood.documentation={folder / 'docs-test.jsonl'}"]


def _alone() -> World:
    return World(rank=0, size=1, device=torch.device("cpu"))


def run(task: Task, setting: Setting, given: Sequence[str], folder: Path) -> dict[str, Any]:
    """Train and score. AdamW's weights stay in `folder`, for WiSE-FT."""
    quiet_libraries()
    if task.method == WISE:
        return _interpolated(task, setting, given, folder)
    job = load_job(setting.recipe, [*settings_of(task, setting), *given])
    method = by_name(task.method)
    here = folder / scratch(task, setting)
    here.mkdir(parents=True, exist_ok=True)
    start = check_checkpoint(job.checkpoint or "", job.revision)
    if not setting.probe:
        _share_heads(folder / "heads", here / "heads")
    trainer = _trainer(job, start, here)
    chosen = Method(method.rule, None if method.rule == "adamw" else job.spd_config(method.rule).weight_decay)
    keep = here / "checkpoint"
    if task.tune and task.method != ADAMW:
        validation = trainer.splits(task.seed).validation
        if validation is None:
            raise RuntimeError(f"{setting.title}: has no validation set to tune by")
        score = trainer.validate(chosen, task.seed, validation)
        shutil.rmtree(here)
        return {"validation": score}
    result = trainer.train(chosen, task.seed, save_to=None if keep.exists() else keep)
    layers = _layers(start, keep)
    found = {
        **_scores(job, keep),
        "deviation": _whole(layers),
        "activation_rate": result.activation_rate,
        "seconds": result.seconds,
        "layers": layers,
        "zero_shot": dict(result.history[0].scores),
        "zero_shot_retained": list(result.history[0].retained.values()),
    }
    if task.method != ADAMW:
        shutil.rmtree(here)
    return found


def _share_heads(shared: Path, own: Path) -> None:
    """The head that goes first is the same for all methods of a seed: it is trained once."""
    shared.mkdir(exist_ok=True)
    if not own.exists():
        own.symlink_to(shared.absolute(), target_is_directory=True)


def _settled(setting: Setting, candidate: Sequence[str], of: int) -> list[str]:
    """The candidate's settings, with AdamW's learning rate unless they have one of their own."""
    lr = load_job(setting.recipe, setting.overrides).train.lr
    has_own = any(text.startswith(LR_TIMES) for text in candidate)
    given = candidate if has_own else [f"{LR_TIMES}{LR_FACTORS[of]:g}", *candidate]
    return [
        f"train.lr={lr * float(text.removeprefix(LR_TIMES)):g}" if text.startswith(LR_TIMES) else text
        for text in given
    ]


def _trainer(job: JobConfig, start: Path, here: Path) -> Trainer:
    alone = _alone()
    task = make_task(job, alone.device)
    progress = Progress(here, alone)
    return Trainer(
        job, task, start, alone, StopRequest(), Recorder(None), Display(visible=False), progress, here
    )


def _scores(job: JobConfig, checkpoint: Path) -> dict[str, Any]:
    scorer = Scorer(job)
    found, metric = scorer.score(checkpoint), scorer.metrics[0]
    by_set = {name: values[metric.name] for name, values in found.metrics.items()}
    kept = {"retained": statistics.fmean(found.retained.values())} if found.retained else {}
    return {
        **kept,
        "metric": metric.name,
        "percent": metric.percent,
        "higher_is_better": metric.higher_is_better,
        "examples": scorer.sizes["validation"],
        "validation": by_set.pop("validation"),
        "scores": by_set,
    }


def _interpolated(task: Task, setting: Setting, given: Sequence[str], folder: Path) -> dict[str, Any]:
    """AdamW's checkpoint of this seed, part of the way back; `task.candidate` counts in `ALPHAS`."""
    job = load_job(setting.recipe, [*setting.overrides, *given])
    start = check_checkpoint(job.checkpoint or "", job.revision)
    end = folder / scratch(weights_of(task), setting) / "checkpoint"
    here = folder / scratch(task, setting)
    shutil.rmtree(here, ignore_errors=True)
    interpolate.write(interpolate.plan(str(start), str(end)), here, ALPHAS[task.candidate])
    layers = _layers(start, here)
    found = {**_scores(job, here), "deviation": _whole(layers), "layers": layers}
    shutil.rmtree(here)
    return found


def _layers(start: Path, end: Path) -> dict[str, tuple[float, float]]:
    """(|w - w0|, |w0|) of each layer that both checkpoints have, in the order of the second one."""
    found = {}
    for pair in interpolate.plan(str(start), str(end)).pairs:
        if pair.start is None:
            continue
        numel = math.prod(pair.end.shape)
        before, after = (read_piece(t, FlatRange(0), numel=numel).double() for t in (pair.start, pair.end))
        found[pair.end.name] = (float((after - before).norm()), float(before.norm()))
    return found


def _whole(layers: dict[str, tuple[float, float]]) -> float:
    away, size = (sum(values[i] ** 2 for values in layers.values()) for i in (0, 1))
    return math.sqrt(away / size)
