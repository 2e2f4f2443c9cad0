"""The interface of a task to the job, and the tasks by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from sharded_spd.checkpoint.export import Whole
from sharded_spd.config.loading import choice
from sharded_spd.finetune.config import JobConfig, PretrainConfig
from sharded_spd.finetune.data.examples import Batch, Splits
from sharded_spd.finetune.metrics import Outcome
from sharded_spd.finetune.tasks.causal_lm import CausalLM
from sharded_spd.finetune.tasks.classification import ImageClassification
from sharded_spd.finetune.tasks.loading import Kind, Loaded
from sharded_spd.finetune.tasks.sequences import SequenceClassification


class Task(Protocol):
    """A kind of model and data: everything of a job that is not about optimizers and ranks."""

    @property
    def metrics(self) -> Sequence[str]:
        """The metrics that it has by name, the usual one first."""
        ...

    @property
    def new_head(self) -> bool:
        """Whether the head is a new one, known once `model_config` was called."""
        ...

    def new_model(self, config: PretrainConfig) -> nn.Module:
        """A model to pre-train, initialised from torch's random state."""
        ...

    def model_config(self, directory: Path) -> Any:
        """The configuration of the model of a checkpoint directory."""
        ...

    def load(self, directory: Path, *, seed: int, empty: bool) -> Loaded:
        """The model of a checkpoint directory in float32; `empty`: without values, where that can be."""
        ...

    def save_model(self, kind: Kind, tensors: Sequence[Whole], to: Path) -> None:
        """Write a checkpoint that `from_pretrained` loads, collective."""
        ...

    def splits(self, model_config: Any, *, seed: int) -> Splits:
        """The sets of the run with `seed`, for a model of that configuration."""
        ...

    def losses(
        self, model: nn.Module, batch: Batch, *, augment: Callable[..., Any] | None = None
    ) -> torch.Tensor:
        """The loss of each example of a batch, added over its targets, `[n]`, with gradients."""
        ...

    def outcome(self, model: nn.Module, batch: Batch) -> Outcome:
        """What the model makes of each example of a batch."""
        ...


TASKS: Mapping[str, Callable[[JobConfig, torch.device], Task]] = {
    "causal-lm": CausalLM,
    "sequence-classification": SequenceClassification,
    "image-classification": ImageClassification,
}


def make_task(config: JobConfig, device: torch.device) -> Task:
    """The task that the configuration names.

    Raises:
        ConfigError: an unknown task, with the nearest name.
    """
    if config.task not in TASKS:
        raise choice("task", config.task, list(TASKS))
    return TASKS[config.task](config, device)
