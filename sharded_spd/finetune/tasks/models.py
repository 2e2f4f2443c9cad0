"""The base of all tasks on Hugging Face models: load, add LoRA, save."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from sharded_spd.checkpoint.export import Whole
from sharded_spd.errors import ConfigError
from sharded_spd.finetune.config import JobConfig, PretrainConfig
from sharded_spd.finetune.tasks.checkpoint import save_checkpoint
from sharded_spd.finetune.tasks.loading import Kind, Loaded, auto_class, load_empty, load_whole
from sharded_spd.finetune.tasks.lora import add_lora, save_adapter


class ModelTask(ABC):
    """A task whose models one of transformers' Auto classes makes."""

    auto: ClassVar[str]
    """The name of that class."""
    peft_kind: ClassVar[str | None] = None
    """What peft calls the task."""
    head: ClassVar[tuple[str, ...]] = ()
    """Names that the head's modules may have."""

    def __init__(self, config: JobConfig, device: torch.device) -> None:
        self._config, self._device = config, device

    new_head: bool = False
    """Whether the head is a new one, known once `model_config` was called."""

    @abstractmethod
    def model_config(self, directory: Path) -> Any:
        """The configuration of the model that is trained."""

    def new_model(self, config: PretrainConfig) -> nn.Module:
        """A model of `config.model_type` with the settings `config.model`, randomly initialised."""
        try:
            made = auto_class("AutoConfig").for_model(config.model_type, **config.model)
            model: nn.Module = auto_class(self.auto).from_config(made, dtype=torch.float32)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"pretrain.model: transformers cannot build a {config.model_type}: {error}"
            ) from None
        return model

    def load(self, directory: Path, *, seed: int, empty: bool) -> Loaded:
        """The model of a checkpoint in float32, with LoRA if wanted; `empty`: without values, if it can be.

        Raises:
            ConfigError: it cannot be loaded, or `load: sharded` is wanted and cannot be.
        """
        config = self.model_config(directory)
        auto, trust = auto_class(self.auto), self._config.trust_remote_code
        loaded: Loaded | None = None
        if empty:
            loaded = load_empty(auto, directory, config, new_head=self.new_head, seed=seed, trust=trust)
            if loaded is None and self._config.load == "sharded":
                raise ConfigError(
                    "load: sharded needs tensors that are stored as the model has them; those of "
                    f"{directory} have to be converted: set load: whole"
                )
        if loaded is None:
            loaded = load_whole(auto, directory, config, new_head=self.new_head, seed=seed, trust=trust)
        if self._config.lora is None:
            return loaded
        heads = [name for name, _ in loaded.model.named_children() if name in self.head]
        return add_lora(
            loaded,
            self._config.lora,
            kind=self.peft_kind,
            head=heads if self.new_head else (),
            seed=seed,
            source=directory,
        )

    def save_model(self, kind: Kind, tensors: Sequence[Whole], to: Path) -> None:
        """Write a checkpoint that `from_pretrained` loads, collective."""
        if kind.adapter is not None:
            save_adapter(kind.adapter, tensors, to, self.add_files)
        else:
            save_checkpoint(kind.model_class, kind.config, tensors, to, add_files=self.add_files)

    @abstractmethod
    def add_files(self, folder: Path) -> None:
        """Write the preprocessing beside a checkpoint, on the main rank."""
