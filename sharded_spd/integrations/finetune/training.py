"""One training of a job: a method and a seed, from the same start as every other."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sharded_spd.checkpoint import Resumed
from sharded_spd.integrations.finetune.checkpoint import names_in_checkpoint
from sharded_spd.integrations.finetune.config import JobConfig
from sharded_spd.integrations.finetune.data import ImageSet, Splits
from sharded_spd.integrations.finetune.engine_base import Engine
from sharded_spd.integrations.finetune.engines import engine_factory
from sharded_spd.integrations.finetune.evaluate import evaluate
from sharded_spd.integrations.finetune.methods import Method, set_up
from sharded_spd.integrations.finetune.progress import Display
from sharded_spd.integrations.finetune.records import ID, Evaluation, Recorder, TrainingResult
from sharded_spd.integrations.finetune.resume import Keeper, Progress
from sharded_spd.integrations.finetune.tasks import Task
from sharded_spd.integrations.finetune.train import StepReport, fit
from sharded_spd.integrations.finetune.world import StopRequest, World


class _Live:
    """A model in training: its engine, its optimizer, and how far it has moved from its start."""

    def __init__(self, trainer: Trainer, method: Method, seed: int, purpose: str) -> None:
        torch.manual_seed(seed)  # of a new head
        model = trainer.task.load_model(trainer.checkpoint)
        self.model_class, self.model_config = type(model), model.config
        names = names_in_checkpoint(model, trainer.checkpoint)
        self.engine: Engine = engine_factory(trainer.config.engine, trainer.world)(model)
        self.optimizer, self.projector = set_up(
            method, self.engine, trainer.config, checkpoint=trainer.checkpoint, names=names
        )
        self._start = self.engine.local_copy() if self.projector is None else {}
        self.rates: list[float] = []
        self.keeper: Keeper | None = None
        if self.engine.resumable:
            name = f"{purpose}-{method.name}-{method.weight_decay}-seed{seed}"
            self.keeper = Keeper(
                trainer.directory / "training" / name,
                trainer.config.checkpointing,
                self.engine,
                self.optimizer,
                self.projector,
            )

    def distance(self) -> float:
        """|w - w0| / |w0| over all layers, collective."""
        if self.projector is None:
            distance, size = self.engine.squared_distance(self._start)
        else:
            norms = self.projector.deviation().values()
            distance, size = sum(d * d for d, _ in norms), sum(n * n for _, n in norms)
        return math.sqrt(distance / size) if size else math.nan

    def step_figures(self) -> tuple[float | None, float | None]:
        """The activation rate and the relative deviation of the last step, where a rule is attached.

        Collective where ranks project different layers; else only the main rank has them.
        """
        if self.projector is None or not (self.engine.world.main or self.engine.shares_layers):
            return None, None
        metrics = self.projector.metrics()
        rate, deviation = float(metrics["activation_rate"]), metrics.get("deviation_rel")
        if self.engine.shares_layers:
            rate, deviation = self._over_ranks(metrics)
        self.rates.append(rate)
        return rate, deviation

    def _over_ranks(self, metrics: dict[str, Any]) -> tuple[float, float | None]:
        away, share = metrics.get("deviation", 0.0), metrics.get("deviation_rel", 0.0)
        size = away / share if share else 0.0
        own = [metrics["activation_rate"] * metrics["num_layers"], metrics["num_layers"], away**2, size**2]
        sums = torch.tensor(own, dtype=torch.float64, device=self.engine.world.device)
        active, layers, distance, whole = self.engine.world.sum_(sums).tolist()
        return active / max(layers, 1), math.sqrt(distance / whole) if whole else None


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
        self._live: _Live | None = None
        self._model_config = task.load_model(checkpoint).config
        self._seen: dict[int, Splits] = {}
        self._zero_shot: dict[int, Evaluation] = {}

    def splits(self, seed: int) -> Splits:
        """The sets of the run with `seed`, read once."""
        if seed not in self._seen:
            self._seen[seed] = self.task.splits(self._model_config, seed=seed)
        return self._seen[seed]

    def zero_shot(self, seed: int) -> Evaluation:
        """The scores before training, found once; only a new head makes them depend on the seed."""
        seed = seed if self.config.classes else self.config.seeds[0]
        if seed not in self._zero_shot:
            self._zero_shot[seed] = self._score_start(seed)
        return self._zero_shot[seed]

    def _score_start(self, seed: int) -> Evaluation:
        torch.manual_seed(seed)
        engine = engine_factory(self.config.engine, self.world)(self.task.load_model(self.checkpoint))
        return self._evaluate(engine, seed, step=0, epoch=0.0)

    def _evaluate(self, engine: Engine, seed: int, *, step: int, epoch: float) -> Evaluation:
        splits = self.splits(seed)
        sets: dict[str, ImageSet] = {ID: splits.test, **splits.ood}
        scores = evaluate(engine, self.task, sets, batch_size=self.config.eval_batch_size)
        return Evaluation(step, epoch, scores)

    def validate(self, method: Method, seed: int, validation: ImageSet) -> float:
        """Train, then score the validation set, unless that is done; the test sets are not touched."""
        key = f"{method.name} {method.weight_decay} {seed}"
        if key in self.progress.validated:
            return self.progress.validated[key]
        live = self._fit(method, seed, purpose="select")
        score = evaluate(live.engine, self.task, {"v": validation}, batch_size=self.config.eval_batch_size)[
            "v"
        ]
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
        start = self.zero_shot(seed)
        history = [start]
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

    def _done(self, live: _Live) -> None:
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
    ) -> _Live:
        live = self._live = _Live(self, method, seed, purpose)
        tags = {"purpose": purpose, "method": method.name, "weight_decay": method.weight_decay, "seed": seed}
        self.display.begin(f"{'choosing ' if purpose == 'select' else ''}{method.label} seed {seed}")
        done = 0

        def on_step(report: StepReport) -> None:
            nonlocal done
            rate, deviation = live.step_figures()
            self.display.advance(report, steps=report.step - done, activation_rate=rate, deviation=deviation)
            self.recorder.write("step", **tags, **asdict(report), activation_rate=rate, deviation=deviation)
            done = report.step
            if speeds is not None:
                speeds.append(report.samples_per_second)

        def on_evaluation(step: int, epoch: float) -> None:
            if history is None or history[-1].step == step > 0:
                return
            found = self._evaluate(live.engine, seed, step=step, epoch=epoch)
            history.append(found)
            self.recorder.write("evaluation", **tags, step=found.step, epoch=found.epoch, scores=found.scores)
            self.display.evaluated(found)

        def adopt(resumed: Resumed) -> None:
            nonlocal done
            done = resumed.step
            if history is not None:
                history[:] = [Evaluation(**entry) for entry in resumed.extra["history"]]
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

    def _save(self, live: _Live, to: Path) -> None:
        self.task.save_model(live.model_class, live.model_config, live.engine.wholes(), to)

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
