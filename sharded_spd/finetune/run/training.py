"""One training of a job: a method and a seed, from the same start as every other."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch

from sharded_spd.checkpoint import Resumed
from sharded_spd.finetune.config import JobConfig
from sharded_spd.finetune.data.examples import ExampleSet, Splits
from sharded_spd.finetune.engines.base import Engine
from sharded_spd.finetune.metrics import make_metrics
from sharded_spd.finetune.report.records import Evaluation, Recorder, TrainingResult
from sharded_spd.finetune.run.evaluate import evaluate
from sharded_spd.finetune.run.head_first import read_head, train_head
from sharded_spd.finetune.run.live import ModelInTraining, loads_shards
from sharded_spd.finetune.run.loop import StepReport, fit
from sharded_spd.finetune.run.methods import Method
from sharded_spd.finetune.run.progress import Display
from sharded_spd.finetune.run.resume import Progress
from sharded_spd.finetune.run.score import score_sets
from sharded_spd.finetune.run.stopping import stops_early
from sharded_spd.finetune.tasks.registry import Task
from sharded_spd.finetune.world import StopRequest, World

LAYER_MOMENTS = 40
"""How often in a training the figures of each layer are written."""


class Trainer:
    """Trains each method of a job from the job's checkpoint."""

    def __init__(
        self,
        config: JobConfig,
        task: Task,
        checkpoint: Path,
        world: World,
        stop: StopRequest,
        recorder: Recorder,
        display: Display,
        progress: Progress,
        directory: Path,
    ) -> None:
        self.config, self.task, self.checkpoint = config, task, checkpoint
        self.world, self.stop, self.recorder, self.display = world, stop, recorder, display
        self.progress, self.directory = progress, directory
        self._live: ModelInTraining | None = None
        self.metrics = make_metrics(config.metrics or task.metrics[:1], known=task.metrics)
        self._model_config = world.agree(lambda: task.model_config(checkpoint))
        self._seen: dict[int, Splits] = {}
        self._zero_shot: dict[int, Evaluation] = {}
        # Before training, only a new or a trained head makes the scores depend on the seed.
        self._one_start = not (task.new_head or config.head_first)

    def splits(self, seed: int) -> Splits:
        """The sets of the run with `seed`, read once. Collective."""
        if seed not in self._seen:
            self._seen[seed] = self.world.agree(lambda: self.task.splits(self._model_config, seed=seed))
        return self._seen[seed]

    def head(self, seed: int) -> dict[str, torch.Tensor]:
        """The head that is trained before everything else, once for a seed; nothing without `head_first`.

        Collective.
        """
        if self.config.head_first is None:
            return {}
        path = self.directory / "heads" / f"seed{seed}.safetensors"
        if not self.world.broadcast(path.is_file()):
            self.display.begin(f"head, seed {seed}")
            train_head(
                self.config,
                self.task,
                self.checkpoint,
                self.splits(seed).train,
                seed=seed,
                empty=loads_shards(self.config, self.world),
                to=path,
                world=self.world,
                stop=self.stop,
                on_step=lambda report: self.recorder.write("head", seed=seed, **asdict(report)),
            )
        return self.world.agree(lambda: read_head(path))

    def _start(self, live: ModelInTraining, seed: int) -> list[Evaluation]:
        """The scores before training, found once where they are the same for all seeds.

        Nothing where the training goes on from a checkpoint, which has them.
        """
        seed = self.config.seeds[0] if self._one_start else seed
        if seed not in self._zero_shot:
            if live.keeper is not None and live.keeper.kept:
                return []
            found = self._zero_shot[seed] = self._evaluate(live.engine, seed, step=0, epoch=0.0)
            known = {name: value for name, value in asdict(found).items() if name not in ("step", "epoch")}
            self.recorder.write("zero-shot", seed=seed, **known)
            every = {**found.scores, **{f"retained: {name}": kept for name, kept in found.retained.items()}}
            self.display.say(
                "Zero-shot: " + "  ".join(f"{name} {score:.1f}" for name, score in every.items())
            )
        return [self._zero_shot[seed]]

    def _evaluate(self, engine: Engine, seed: int, *, step: int, epoch: float) -> Evaluation:
        stopping = self.config.train.early_stopping
        return score_sets(
            engine,
            self.task,
            self.splits(seed),
            metrics=self.metrics,
            batch_size=self.config.eval_batch_size,
            validation=stopping is not None and stopping.set is None,
            step=step,
            epoch=epoch,
        )

    def validate(self, method: Method, seed: int, validation: ExampleSet) -> float:
        """Train, then score the validation set, unless that is done; the test sets are not touched."""
        key = f"{method.name} {method.weight_decay} {seed}"
        if key in self.progress.validated:
            return self.progress.validated[key]
        live = self._fit(method, seed, purpose="select")
        first, batch_size = self.metrics[:1], self.config.eval_batch_size
        found = evaluate(live.engine, self.task, {"v": validation}, metrics=first, batch_size=batch_size)
        score = found["v"][first[0].name]
        self.recorder.write(
            "validation", method=method.name, weight_decay=method.weight_decay, seed=seed, score=score
        )
        self.progress.add_validation(key, score)
        self._done(live)
        return score

    def train(self, method: Method, seed: int, *, save_to: Path | None) -> TrainingResult:
        """Train, evaluate the test sets on the way, and save the checkpoint, unless that is done."""
        for done in self.progress.results:
            if (done.method, done.weight_decay, done.seed) == (method.name, method.weight_decay, seed):
                return done
        history: list[Evaluation] = []
        began = time.perf_counter()
        speeds: list[float] = []
        live = self._fit(method, seed, purpose="compare", history=history, speeds=speeds)
        if save_to is not None:
            self._save(live, save_to)
        result = TrainingResult(
            method=method.name,
            weight_decay=method.weight_decay,
            seed=seed,
            history=tuple(history),
            activation_rate=statistics.fmean(live.rates) if live.rates else None,
            deviation=live.distance(),
            samples_per_second=speeds[-1],
            seconds=time.perf_counter() - began,
            checkpoint=None if save_to is None else str(save_to),
        )
        self.recorder.write("trained", **{**asdict(result), "history": None})
        self.progress.add_result(result)
        self._done(live)
        return result

    def _done(self, live: ModelInTraining) -> None:
        """Let a training go whose outcome is written down."""
        self._live = None
        if live.keeper is not None:
            live.keeper.drop()

    def _fit(
        self,
        method: Method,
        seed: int,
        *,
        purpose: str,
        history: list[Evaluation] | None = None,
        speeds: list[float] | None = None,
    ) -> ModelInTraining:
        live = self._live = ModelInTraining(self, method, seed, purpose)
        if history is not None:
            history[:] = self._start(live, seed)
        tags = {"purpose": purpose, "method": method.name, "weight_decay": method.weight_decay, "seed": seed}
        if live.keeper is None or not live.keeper.kept:
            self.recorder.forget(tags, after=0)
        self.display.begin(f"{'choosing ' if purpose == 'select' else ''}{method.label} seed {seed}")
        done = 0

        def on_step(report: StepReport) -> None:
            nonlocal done
            rate, deviation = live.step_figures()
            self.display.advance(report, steps=report.step - done, activation_rate=rate, deviation=deviation)
            self.recorder.write("step", **tags, **asdict(report), activation_rate=rate, deviation=deviation)
            # About LAYER_MOMENTS times in a training: every step's would be most of the file.
            if report.step * LAYER_MOMENTS // report.steps > done * LAYER_MOMENTS // report.steps:
                layers = live.layer_figures()
                if layers:
                    self.recorder.write("layers", **tags, step=report.step, epoch=report.epoch, layers=layers)
            done = report.step
            if speeds is not None:
                speeds.append(report.samples_per_second)

        def on_evaluation(step: int, epoch: float) -> bool:
            if history is None:
                return False
            if history[-1].step != step or step == 0:
                found = self._evaluate(live.engine, seed, step=step, epoch=epoch)
                history.append(found)
                self.recorder.write("evaluation", **tags, **asdict(found))
                self.display.evaluated(found)
            enough = stops_early(self.config.train.early_stopping, history, self.metrics)
            if enough:
                self.recorder.write("stopped early", **tags, step=step)
                self.display.say(f"{method.label} seed {seed}: stopped early after step {step}")
            return enough

        def adopt(resumed: Resumed) -> None:
            nonlocal done
            done = resumed.step
            self.recorder.forget(tags, after=done)
            if history is not None:
                history[:] = [Evaluation(**entry) for entry in resumed.extra["history"]]
                self._zero_shot.setdefault(self.config.seeds[0] if self._one_start else seed, history[0])
            live.rates[:] = resumed.extra["rates"]
            if speeds is not None:
                speeds.extend(resumed.extra["speeds"])
            self.recorder.write("resumed", **tags, step=done, checkpoint=str(resumed.path))
            self.display.say(f"Going on after step {done}: {resumed.path}")

        if live.keeper is not None:
            live.keeper.adopt = adopt
            live.keeper.describe = lambda: {
                "history": [asdict(found) for found in history or ()],
                "rates": live.rates,
                "speeds": (speeds or [])[-1:],
            }
        fit(
            live.engine,
            live.optimizer,
            self.task,
            self.splits(seed).train,
            config=self.config.train,
            seed=seed,
            stop=self.stop,
            on_step=on_step,
            on_evaluation=on_evaluation,
            keeper=live.keeper,
        )
        return live

    def _save(self, live: ModelInTraining, to: Path) -> None:
        self.task.save_model(live.kind, live.engine.wholes(), to)

    @property
    def can_go_on(self) -> bool:
        """Whether the training that was stopped left a checkpoint."""
        return self._live is not None and self._live.keeper is not None

    def save_interrupted(self) -> Path | None:
        """Save the model that was in training when the job was stopped, if there was one. Collective."""
        if self._live is None:
            return None
        to = self.directory / "checkpoints" / "interrupted"
        self._save(self._live, to)
        return to
