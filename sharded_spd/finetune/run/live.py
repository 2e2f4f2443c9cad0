"""A model in training, and its distance from its start."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import torch

from sharded_spd.finetune.config import JobConfig
from sharded_spd.finetune.engines.base import Engine
from sharded_spd.finetune.engines.registry import ENGINES, check_engine, engine_factory
from sharded_spd.finetune.run.head_first import with_head
from sharded_spd.finetune.run.methods import Method, set_up
from sharded_spd.finetune.run.resume import Keeper
from sharded_spd.finetune.tasks.loading import Kind, Weights
from sharded_spd.finetune.tasks.registry import Task
from sharded_spd.finetune.world import World
from sharded_spd.sharding.names import clean_fqns


class Run(Protocol):
    """What a training is part of."""

    config: JobConfig
    world: World
    task: Task
    checkpoint: Path
    directory: Path

    def head(self, seed: int) -> dict[str, torch.Tensor]:
        """The head that was trained first, if one was."""
        ...


class ModelInTraining:
    """A model in training: its engine, its optimizer, and how far it has moved from its start."""

    def __init__(self, trainer: Run, method: Method, seed: int, purpose: str) -> None:
        config, world = trainer.config, trainer.world
        empty = loads_shards(config, world)
        head = trainer.head(seed)
        torch.manual_seed(seed)
        loaded = world.agree(lambda: trainer.task.load(trainer.checkpoint, seed=seed, empty=empty))
        loaded = with_head(loaded, head)
        self.kind = Kind.of(loaded.model)
        weights = None if loaded.whole else Weights(loaded, trainer.checkpoint)
        self.engine: Engine = engine_factory(config.engine, world, config.train)(loaded.model, weights)
        self.optimizer, self.projector = set_up(
            method, self.engine, config, checkpoint=trainer.checkpoint, names=loaded.names, head=head
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
        if math.isnan(rate):
            return None, deviation
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
