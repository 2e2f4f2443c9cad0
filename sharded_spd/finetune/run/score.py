"""The scores of a model on the sets of a job: of one in training, and of finished checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sharded_spd.errors import ConfigError
from sharded_spd.finetune.config import JobConfig, NamedBlock
from sharded_spd.finetune.data.examples import ExampleSet, Splits
from sharded_spd.finetune.engines.base import Engine
from sharded_spd.finetune.engines.registry import engine_factory
from sharded_spd.finetune.metrics import Metric, UserMetric, make_metrics
from sharded_spd.finetune.report.records import ID, Evaluation
from sharded_spd.finetune.run.evaluate import evaluate, retained
from sharded_spd.finetune.run.stopping import VALIDATION
from sharded_spd.finetune.tasks.checkpoint import check_checkpoint
from sharded_spd.finetune.tasks.registry import Task, make_task
from sharded_spd.finetune.world import World, pick_device


class Scorer:
    """Scores checkpoints whose own head is for the classes of the job's data.

    Raises:
        ConfigError: what is wrong with the job, its data, or a checkpoint.
    """

    def __init__(self, job: JobConfig) -> None:
        self._device = pick_device(job.device, local_rank=0)
        # The sets are the job's, the head the checkpoint's own.
        self._job = replace(
            job, engine=NamedBlock(name="single"), ranks=1, classes=(), lora=None, load="whole"
        )
        self._world = World(rank=0, size=1, device=self._device)
        self._splits: Splits | None = None
        self.sizes: dict[str, int] = {}
        """The number of examples of each set, once something was scored."""
        task = make_task(self._job, self._device)
        self.metrics = make_metrics(job.metrics or task.metrics[:1], known=task.metrics)

    def prepare(self, checkpoint: Path) -> None:
        """Read the job's data for a checkpoint, or for those with the same configuration and tokenizer."""
        self._ready(checkpoint)

    def score(self, checkpoint: Path) -> Evaluation:
        """All metrics of one checkpoint on the test sets, and on the validation set where there is one."""
        job, world = self._job, self._world
        task, splits = self._ready(checkpoint)
        loaded = task.load(checkpoint, seed=job.seeds[0], empty=False)
        engine = engine_factory(job.engine, world, job.train)(loaded.model, None)
        self.sizes = {name: len(data) for name, data in _sets(splits, validation=True).items()}
        return score_sets(
            engine, task, splits, metrics=self.metrics, batch_size=job.eval_batch_size, validation=True
        )

    def _ready(self, checkpoint: Path) -> tuple[Task, Splits]:
        """A task that knows the checkpoint's configuration, and the sets, which are read once."""
        task = make_task(self._job, self._device)
        check_checkpoint(str(checkpoint), None)
        model_config = task.model_config(checkpoint)
        if task.new_head:
            raise ConfigError(f"{checkpoint}: has no head for this job's data: train it first")
        if self._splits is None:
            self._splits = task.splits(model_config, seed=self._job.seeds[0])
        return task, self._splits


def score_sets(
    engine: Engine,
    task: Task,
    splits: Splits,
    *,
    metrics: Sequence[Metric | UserMetric],
    batch_size: int,
    validation: bool,
    step: int = 0,
    epoch: float = 0.0,
) -> Evaluation:
    """All metrics on the test sets, if wanted on the validation set, and of what is retained. Collective."""
    sets = _sets(splits, validation=validation)
    found = evaluate(engine, task, sets, metrics=metrics, batch_size=batch_size)
    first = metrics[0].name
    scores = {name: values[first] for name, values in found.items() if name != VALIDATION}
    return Evaluation(step, epoch, scores, found, retained(engine, task, splits.retained))


def _sets(splits: Splits, *, validation: bool) -> dict[str, ExampleSet]:
    sets: dict[str, ExampleSet] = {ID: splits.test, **splits.ood}
    if validation and splits.validation is not None:
        sets[VALIDATION] = splits.validation
    return sets
