"""What a task brings to the job, and the tasks by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from sharded_spd.checkpoint.export import Whole
from sharded_spd.integrations.finetune.classification import ImageClassification
from sharded_spd.integrations.finetune.config import JobConfig, PretrainConfig
from sharded_spd.integrations.finetune.data import ImageSet, Splits
from sharded_spd.integrations.finetune.strict import choice


class Task(Protocol):
    """A kind of model and data: everything of a job that is not about optimizers and ranks."""

    @property
    def metric(self) -> str:
        """What the mean of `scores` is called."""
        ...

    def new_model(self, config: PretrainConfig) -> nn.Module:
        """A model to pre-train, initialised from torch's random state."""
        ...

    def load_model(self, directory: Path) -> nn.Module:
        """The model of a checkpoint directory in float32; a new head is drawn from torch's random state."""
        ...

    def save_model(self, model_class: type[Any], config: Any, tensors: Sequence[Whole], to: Path) -> None:
        """Write a checkpoint that `from_pretrained` loads, collective."""
        ...

    def splits(self, model_config: Any, *, seed: int) -> Splits:
        """The sets of the run with `seed`, for a model of that configuration."""
        ...

    def losses(
        self, model: nn.Module, data: ImageSet, indices: torch.Tensor, *, augment: Callable[..., Any] | None
    ) -> torch.Tensor:
        """The loss of each example at `indices`, `[len(indices)]`, with gradients."""
        ...

    def scores(self, model: nn.Module, data: ImageSet, indices: torch.Tensor) -> torch.Tensor:
        """How well each example at `indices` is solved, `[len(indices)]`, from 0 to 1."""
        ...


TASKS: Mapping[str, Callable[[JobConfig, torch.device], Task]] = {"image-classification": ImageClassification}


def make_task(config: JobConfig, device: torch.device) -> Task:
    """The task that the configuration names.

    Raises:
        ConfigError: an unknown task, with the nearest name.
    """
    if config.task not in TASKS:
        raise choice("task", config.task, list(TASKS))
    return TASKS[config.task](config, device)
