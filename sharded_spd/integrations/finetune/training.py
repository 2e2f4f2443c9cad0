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
from sharded_spd.integrations.finetune.config import JobConfig
from sharded_spd.integrations.finetune.engine_base import Engine
from sharded_spd.integrations.finetune.engines import ENGINES, check_engine, engine_factory
from sharded_spd.integrations.finetune.evaluate import evaluate
from sharded_spd.integrations.finetune.examples import ExampleSet, Splits
from sharded_spd.integrations.finetune.loading import Kind, Weights
from sharded_spd.integrations.finetune.methods import Method, set_up
from sharded_spd.integrations.finetune.metrics import make_metrics
from sharded_spd.integrations.finetune.progress import Display
from sharded_spd.integrations.finetune.records import ID, Evaluation, Recorder, TrainingResult
from sharded_spd.integrations.finetune.resume import Keeper, Progress
from sharded_spd.integrations.finetune.stopping import VALIDATION, stops_early
from sharded_spd.integrations.finetune.tasks import Task
from sharded_spd.integrations.finetune.train import StepReport, fit
from sharded_spd.integrations.finetune.world import StopRequest, World
from sharded_spd.names import clean_fqns

LAYER_MOMENTS = 40
"""How often in a training the figures of each layer are written."""


class _Live:
    """A model in training: its engine, its optimizer, and how far it has moved from its start."""

    def __init__(self, trainer: Trainer, method: Method, seed: int, purpose: str) -> None:
        torch.manual_seed(seed)
        config, world = trainer.config, trainer.world
        empty = loads_shards(config, world)
        loaded = world.agree(lambda: trainer.task.load(trainer.checkpoint, seed=seed, empty=empty))
        self.kind = Kind.of(loaded.model)
        weights = None if loaded.whole else Weights(loaded, trainer.checkpoint)
        self.engine: Engine = engine_factory(config.engine, world, config.train)(loaded.model, weights)
        self.optimizer, self.projector = set_up(
            method, self.engine, config, checkpoint=trainer.checkpoint, names=loaded.names
        )
        self._start = self.engine.local_copy() if self.projector is None else {}
        self.rates: list[float] = []
        self.layers: dict[str, dict[str, float]] = {}
        names = clean_fqns([name for name, _ in self.engine.named_model.named_parameters()])
        self._order = {name: i for i, name in enumerate(names)}
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
            squares = self.engine.squared_distances(self._start).values()
            distance, size = sum(d for d, _ in squares), sum(n for _, n in squares)
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
        self.layers = metrics["layers"]
        rate, deviation = float(metrics["activation_rate"]), metrics.get("deviation_rel")
        if self.engine.shares_layers:
            rate, deviation = self._over_ranks(metrics)
        self.rates.append(rate)
        return rate, deviation

    def layer_figures(self) -> dict[str, dict[str, float]]:
        """Deviation and pull of each layer in the last step, layers in the model's order.

        Collective where ranks project different layers, and without a rule, where they are measured now.
        """
        found = self.layers
        if self.projector is None:
            found = self._measured()
        elif self.engine.shares_layers:
            found = {name: own for part in self.engine.world.gather(found) for name, own in part.items()}
        last = len(self._order)
        names = sorted(found, key=lambda name: self._order.get(name, last))
        kept = ("deviation", "deviation_rel", "s")
        return {name: {k: found[name][k] for k in kept if k in found[name]} for name in names}

    def _measured(self) -> dict[str, dict[str, float]]:
        squares = self.engine.squared_distances(self._start)
        found: dict[str, dict[str, float]] = {}
        for name, (distance, size) in zip(clean_fqns(list(squares)), squares.values(), strict=True):
            own = found[name] = {"deviation": math.sqrt(distance)}
            if size:
                own["deviation_rel"] = math.sqrt(distance / size)
        return found

    def _over_ranks(self, metrics: dict[str, Any]) -> tuple[float, float | None]:
        away, share = metrics.get("deviation", 0.0), metrics.get("deviation_rel", 0.0)
        size = away / share if share else 0.0
        own = [metrics["activation_rate"] * metrics["num_layers"], metrics["num_layers"], away**2, size**2]
        sums = torch.tensor(own, dtype=torch.float64, device=self.engine.world.device)
        active, layers, distance, whole = self.engine.world.sum_(sums).tolist()
        return active / max(layers, 1), math.sqrt(distance / whole) if whole else None


def loads_shards(config: JobConfig, world: World) -> bool:
    """Whether each rank reads its shards only, so that none ever holds the whole model."""
    engine = ENGINES[config.engine.name]
    return (
        config.load != "whole"
        and torch.distributed.is_initialized()
        and engine.loads_shards(check_engine(config.engine))
    )


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
        self.metrics = make_metrics(config.metrics or task.metrics[:1], known=task.metrics)
        self._model_config = world.agree(lambda: task.model_config(checkpoint))
        self._seen: dict[int, Splits] = {}
        self._zero_shot: dict[int, Evaluation] = {}

    def splits(self, seed: int) -> Splits:
        """The sets of the run with `seed`, read once. Collective."""
        if seed not in self._seen:
            self._seen[seed] = self.world.agree(lambda: self.task.splits(self._model_config, seed=seed))
        return self._seen[seed]

    def _start(self, live: _Live, seed: int) -> list[Evaluation]:
        """The scores before training, found once: only a new head makes them depend on the seed.

        Nothing where the training goes on from a checkpoint, which has them.
        """
        seed = seed if self.task.new_head else self.config.seeds[0]
        if seed not in self._zero_shot:
            if live.keeper is not None and live.keeper.kept:
                return []
            found = self._zero_shot[seed] = self._evaluate(live.engine, seed, step=0, epoch=0.0)
            self.recorder.write("zero-shot", seed=seed, scores=found.scores, metrics=found.metrics)
            self.display.say(
                "Zero-shot: " + "  ".join(f"{name} {score:.1f}" for name, score in found.scores.items())
            )
        return [self._zero_shot[seed]]

    def _evaluate(self, engine: Engine, seed: int, *, step: int, epoch: float) -> Evaluation:
        splits = self.splits(seed)
        sets: dict[str, ExampleSet] = {ID: splits.test, **splits.ood}
        stopping = self.config.train.early_stopping
        if stopping is not None and stopping.set is None and splits.validation is not None:
            sets[VALIDATION] = splits.validation
        found = evaluate(
            engine, self.task, sets, metrics=self.metrics, batch_size=self.config.eval_batch_size
        )
        first = self.metrics[0].name
        scores = {name: values[first] for name, values in found.items() if name != VALIDATION}
        return Evaluation(step, epoch, scores, found)

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
                self._zero_shot.setdefault(seed if self.task.new_head else self.config.seeds[0], history[0])
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
