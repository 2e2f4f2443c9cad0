"""The fine-tuning job from end to end, as every rank runs it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sharded_spd.errors import ConfigError
from sharded_spd.finetune.config import PLAIN, JobConfig
from sharded_spd.finetune.engines.registry import ENGINES, check_engine
from sharded_spd.finetune.metrics import make_metrics
from sharded_spd.finetune.report.page import write_report
from sharded_spd.finetune.report.plot import draw
from sharded_spd.finetune.report.records import Recorder, TrainingResult, new_directory
from sharded_spd.finetune.report.summary import compared, print_summary, write_results
from sharded_spd.finetune.report.trackers import check_trackers
from sharded_spd.finetune.report.tracking import HURRY, PATIENCE, Tracking
from sharded_spd.finetune.run.loop import StepReport, total_steps
from sharded_spd.finetune.run.machine import describe_machine, peak_memory
from sharded_spd.finetune.run.methods import Method
from sharded_spd.finetune.run.pretrain import cached_checkpoint, make_checkpoint
from sharded_spd.finetune.run.progress import Display
from sharded_spd.finetune.run.resume import Progress, find_run
from sharded_spd.finetune.run.select import choose_strength
from sharded_spd.finetune.run.training import Trainer
from sharded_spd.finetune.tasks.checkpoint import check_checkpoint
from sharded_spd.finetune.tasks.registry import make_task
from sharded_spd.finetune.world import (
    Interrupted,
    StopRequest,
    World,
    join_world,
    name_lost_ranks,
)


def check_job(config: JobConfig) -> None:
    """Find what is wrong with a job without starting it.

    Raises:
        ConfigError: an unknown task, engine or option, or a missing checkpoint.
    """
    task = make_task(config, torch.device("cpu"))
    make_metrics(config.metrics, known=task.metrics)
    check_trackers(config.track)
    options = check_engine(config.engine)
    if config.engine.name == "single" and config.ranks > 1:
        raise ConfigError(
            f"engine: single runs one rank, got ranks: {config.ranks}; take ddp or fsdp2, or set ranks: 1"
        )
    engine = ENGINES[config.engine.name]
    engine.check(options, config.train)
    if config.checkpointing.every and not engine.resumable:
        raise ConfigError(
            f"checkpointing.every: engine {config.engine.name} cannot save a training in progress; set 0, or "
            "take fsdp2, fsdp1, ddp or deepspeed"
        )
    if config.checkpointing.asynchronous and not engine.in_background:
        raise ConfigError(
            f"checkpointing.asynchronous: engine {config.engine.name} writes them itself; set false"
        )
    freezing = next((name for name in ("lora", "head_first") if getattr(config, name) is not None), None)
    if freezing is not None and not engine.may_freeze(options):
        raise ConfigError(
            f"{freezing}: engine {config.engine.name} has frozen layers in one flat parameter with others; "
            "set use_orig_params: true (fsdp1), flatten_parameters: false (fairscale-fsdp), or take fsdp2"
        )
    if config.load == "sharded" and not engine.loads_shards(options):
        raise ConfigError(
            f"load: sharded: engine {config.engine.name} has the whole model on every rank at first; take "
            "fsdp2, deepspeed at stage 3, or load: auto"
        )
    if config.checkpoint is not None:
        check_checkpoint(config.checkpoint, config.revision)
    if config.pretrain is not None:
        inner = check_engine(config.pretrain.engine, path="pretrain.engine")
        ENGINES[config.pretrain.engine.name].check(inner, config.pretrain.train)


def run_job(config: JobConfig, resume: str | None = None) -> int:
    """Run the job on this rank and return its exit code: 0, or 130 / 143 if it was stopped by a signal.

    `resume`: the directory of a run to resume, or "auto": see `find_run`.
    """
    check_job(config)
    quiet_libraries()
    with StopRequest().listening() as stop, name_lost_ranks(), join_world(config.device) as world:
        return _Job(config, world, stop, resume).run()


def quiet_libraries() -> None:
    """Without the progress bars and notices of transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


class _Job:
    """One job on one rank: its settings, its output folder, and its results so far."""

    def __init__(self, config: JobConfig, world: World, stop: StopRequest, resume: str | None) -> None:
        self.config, self.world, self.stop = config, world, stop
        self.task = make_task(config, world.device)
        self.metric = make_metrics(config.metrics or self.task.metrics[:1], known=self.task.metrics)[0]
        # Imported before anything is written, and where that fails, on no rank does it go on.
        world.agree(lambda: check_trackers(config.track, load=world.main))
        self.resumed = False
        self.directory = Path(self._agreed_directory(resume))
        self.progress = Progress(self.directory, world)
        tracking = Tracking(config.track, self.directory, asdict(config)) if world.main else None
        self.recorder = Recorder(self.directory if world.main else None, tracking)
        self.display = Display(visible=world.main)
        self.results: list[TrainingResult] = []
        self.started = time.perf_counter()
        if world.main and not self.resumed:
            (self.directory / "config.json").write_text(config.to_json(), encoding="utf-8")

    def _agreed_directory(self, resume: str | None) -> str:
        made, problem = None, None
        if self.world.main:
            try:
                found = None if resume is None else find_run(self.config, resume)
                made = str(found or new_directory(self.config.output_dir))
                self.resumed = found is not None
            except OSError as error:
                problem = f"output_dir: {self.config.output_dir} cannot be made: {error.strerror}"
            except ConfigError as error:
                problem = str(error)
        made, problem, self.resumed = self.world.broadcast((made, problem, self.resumed))
        if made is None:
            raise ConfigError(problem or "output_dir: no directory")
        return str(made)

    def run(self) -> int:
        """Every stage in order; a stop in any of them keeps what is finished."""
        try:
            with self._noted_warnings():
                return self._run()
        except BaseException:
            self.recorder.fail()
            raise

    def _run(self) -> int:
        stopped, kept, can_go_on = False, None, False
        trainer: Trainer | None = None
        with self.display as display:
            try:
                display.say(f"{'Going on in' if self.resumed else 'Writing to'} {self.directory}")
                self._begin()
                checkpoint = self._checkpoint()
                trainer = Trainer(
                    self.config,
                    self.task,
                    checkpoint,
                    self.world,
                    self.stop,
                    self.recorder,
                    display,
                    self.progress,
                    self.directory,
                )
                self._train_all(trainer)
            except Interrupted:
                stopped = True
                kept = trainer.save_interrupted() if trainer is not None else None
                can_go_on = trainer is not None and trainer.can_go_on
        self._finish(complete=not stopped)
        if not stopped:
            return 0
        self.display.say(self._what_was_saved(kept, can_go_on=can_go_on))
        return self._stop_code()

    def _begin(self) -> None:
        """Write down what runs, and where."""
        config, metric = self.config, self.metric
        self.recorder.write(
            "run",
            engine=config.engine.name,
            ranks=self.world.size,
            checkpoint=config.checkpoint,
            metric=metric.name,
            percent=metric.percent,
            **describe_machine(self.world.device),
        )

    @contextmanager
    def _noted_warnings(self) -> Iterator[None]:
        """Warnings are shown as usual, and recorded in the run too."""
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
            shown(message, category, *rest, **named)
            if not issubclass(category, (DeprecationWarning, FutureWarning)):  # libraries about each other
                self.recorder.write("warning", text=f"{category.__name__}: {message}")

        warnings.showwarning = show
        try:
            yield
        finally:
            warnings.showwarning = shown

    def _stop_code(self) -> int:
        """The exit code of a stopped job, the same on all ranks."""
        own = self.stop.exit_code if self.stop.signal is not None else 0
        return int(self.world.broadcast(own)) or self.stop.exit_code

    def _checkpoint(self) -> Path:
        pretrain = self.config.pretrain
        if pretrain is None:
            source, revision = self.config.checkpoint or "", self.config.revision
            return self.world.agree(lambda: check_checkpoint(source, revision))
        path = cached_checkpoint(self.config, pretrain, ranks=self.world.size)
        if self.world.broadcast((path / "config.json").is_file()):
            self.display.say(f"Pre-trained checkpoint: {path} (made by an earlier run)")
            return path
        self.display.say(f"Pre-training a {pretrain.model_type} ({pretrain.augment} augmentations), once")
        self.display.begin("pre-training")
        done = 0

        def on_step(report: StepReport) -> None:
            nonlocal done
            if done == 0:
                self.display.begin_stage(report.steps)
            self.display.advance(report, steps=report.step - done)
            self.recorder.write("pretrain", step=report.step, loss=report.loss, lr=report.lr)
            done = report.step

        accuracy = make_checkpoint(
            self.config, pretrain, self.task, to=path, world=self.world, stop=self.stop, on_step=on_step
        )
        self.recorder.write("pretrained", checkpoint=str(path), held_out=accuracy)
        self.display.say(f"Pre-trained checkpoint: {path} ({accuracy:.1f} % on held-out images)")
        return path

    def _train_all(self, trainer: Trainer) -> None:
        config = self.config
        candidates = {name: config.select.weight_decay.get(name, ()) for name in config.compare}
        tried = sum(len(strengths) for strengths in candidates.values() if len(strengths) > 1)
        steps = total_steps(trainer.splits(config.seeds[0]).train, config.train)
        choosing = tried * len(config.select.seeds or config.seeds)
        self.display.begin_stage(steps * (choosing + len(config.seeds) * len(config.compare)))
        methods = [self._choose(name, candidates[name], trainer) for name in config.compare]
        for seed in config.seeds:
            for method in methods:
                save = config.save == "all" or (config.save == "first-seed" and seed == config.seeds[0])
                to = self.directory / "checkpoints" / f"{method.name}-seed{seed}" if save else None
                self.results.append(trainer.train(method, seed, save_to=to))

    def _choose(self, name: str, strengths: Sequence[float], trainer: Trainer) -> Method:
        if name == PLAIN:
            return Method(name)
        if not strengths:
            return Method(name, self.config.spd_config(name).weight_decay)
        if len(strengths) == 1:
            return Method(name, strengths[0])
        validation = trainer.splits(self.config.seeds[0]).validation
        if validation is None:
            raise ConfigError(
                "select: choosing a strength takes a validation set; give data.validation, or one strength"
            )
        seeds = self.config.select.seeds or self.config.seeds
        found = {
            strength: [trainer.validate(Method(name, strength), seed, validation) for seed in seeds]
            for strength in strengths
        }
        metric, rule = trainer.metrics[0], self.config.select.rule
        if rule != "best" and not metric.percent:
            raise ConfigError(f"select.rule: {rule} is for shares; {metric.name} is none: set rule: best")
        chosen = choose_strength(
            found, examples=len(validation), rule=rule, higher_is_better=metric.higher_is_better
        )
        means = ", ".join(f"{s:g}: {sum(v) / len(v):.1f}" for s, v in found.items())
        self.display.say(f"{name}: λ {chosen:g} chosen by validation {metric.name} ({means})")
        self.recorder.write(
            "selected", method=name, weight_decay=chosen, validation={str(s): v for s, v in found.items()}
        )
        return Method(name, chosen)

    def _finish(self, *, complete: bool) -> None:
        """Summarise what is finished; on the main rank only."""
        if self.world.main and self.results:
            seconds = time.perf_counter() - self.started
            columns = compared(self.results)
            write_results(self.directory / "results.json", self.results, columns, seconds=seconds)
            metric = self.metric
            draw(columns, self.directory / "id_ood.png", metric=metric.name, percent=metric.percent)
            print_summary(self.display.console, columns, metric=metric.name, percent=metric.percent)
            self.display.say(
                f"{seconds:.0f} s on {self.world.size} rank(s). In {self.directory}: metrics.jsonl, "
                "results.json, id_ood.png" + ("" if self.config.save == "none" else ", checkpoints/")
            )
        if complete:
            self.progress.finish()
        self.recorder.write(
            "end",
            complete=complete,
            peak_memory=peak_memory(self.world.device),
            trainings=[asdict(r) | {"history": None} for r in self.results],
        )
        self.recorder.close(patience=PATIENCE if complete else HURRY)
        if self.world.main:
            self._report()

    def _report(self) -> None:
        """The report; a run whose report cannot be written still counts as done."""
        try:
            self.display.say(f"Report: {write_report(self.directory)}")
        except Exception as error:  # nothing in it may cost a run its result
            self.display.say(f"No report: {type(error).__name__}: {error}; sharded-spd report tries again")

    def _what_was_saved(self, where: Path | None, *, can_go_on: bool) -> str:
        saved = [f"metrics.jsonl and config.json in {self.directory}"]
        if self.results:
            saved.insert(0, f"{len(self.results)} finished training(s) with their results")
        if where is not None:
            saved.append(f"the unfinished model at {where}")
        text = f"Stopped. Saved: {'; '.join(saved)}."
        return f"{text} The same command with --resume {self.directory} goes on." if can_go_on else text
