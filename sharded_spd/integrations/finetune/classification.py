"""Image classification with the models that transformers knows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sharded_spd.checkpoint.export import Whole
from sharded_spd.errors import ConfigError
from sharded_spd.integrations.finetune.checkpoint import save_checkpoint
from sharded_spd.integrations.finetune.config import JobConfig, PretrainConfig
from sharded_spd.integrations.finetune.data import ImageSet, Splits
from sharded_spd.integrations.finetune.sources import ImageSpec, load_splits


class ImageClassification:
    """A Hugging Face image classifier and labelled images; scored by accuracy."""

    metric = "accuracy"

    def __init__(self, config: JobConfig, device: torch.device) -> None:
        self._config = config
        self._device = device
        # Until a checkpoint says otherwise: [0, 1] becomes [-1, 1].
        self._mean = self._std = torch.tensor([0.5])
        self._loaded_from: Path | None = None

    def new_model(self, config: PretrainConfig) -> nn.Module:
        """A model of `config.model_type` with the settings `config.model`, randomly initialised."""
        from transformers import AutoConfig, AutoModelForImageClassification

        try:
            made = AutoConfig.for_model(config.model_type, **config.model)
            model: nn.Module = AutoModelForImageClassification.from_config(made)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"pretrain.model: transformers cannot build a {config.model_type}: {error}"
            ) from None
        return model

    def load_model(self, directory: Path) -> nn.Module:
        """The classifier at `directory` in float32, with a new head if the configuration names classes."""
        from transformers import AutoModelForImageClassification

        settings: dict[str, Any] = {}
        if self._config.classes:
            names = dict(enumerate(self._config.classes))
            settings = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
        try:
            model: nn.Module = AutoModelForImageClassification.from_pretrained(
                directory,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                **settings,
            )
        except (ValueError, OSError, KeyError, RuntimeError) as error:
            raise ConfigError(
                f"checkpoint: {directory} cannot be loaded as an image classifier: {error}"
            ) from None
        self._read_preprocessing(directory)
        return model.float()

    def _read_preprocessing(self, directory: Path) -> None:
        file = directory / "preprocessor_config.json"
        if file.is_file():
            settings = json.loads(file.read_text(encoding="utf-8"))
            if settings.get("do_normalize", True) and "image_mean" in settings:
                self._mean = torch.tensor(settings["image_mean"], dtype=torch.float32)
                self._std = torch.tensor(settings["image_std"], dtype=torch.float32)
        self._loaded_from = directory

    def save_model(self, model_class: type[Any], config: Any, tensors: Sequence[Whole], to: Path) -> None:
        """Write the classifier and its preprocessing, collective."""
        height, width = _image_size(config)
        settings = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": height, "width": width},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": self._mean.tolist(),
            "image_std": self._std.tolist(),
        }
        save_checkpoint(model_class, config, tensors, to, like=self._loaded_from, settings=settings)

    def splits(self, model_config: Any, *, seed: int) -> Splits:
        """The sets of the run with `seed`."""
        classes = {str(name): int(index) for name, index in model_config.label2id.items()}
        spec = ImageSpec(_image_size(model_config), int(getattr(model_config, "num_channels", 3)), classes)
        return load_splits(self._config.data, spec=spec, seed=seed)

    def losses(
        self, model: nn.Module, data: ImageSet, indices: torch.Tensor, *, augment: Callable[..., Any] | None
    ) -> torch.Tensor:
        """Cross-entropy of each image."""
        labels = data.labels[indices].to(self._device)
        return nn.functional.cross_entropy(
            self._logits(model, data, indices, augment), labels, reduction="none"
        )

    def scores(self, model: nn.Module, data: ImageSet, indices: torch.Tensor) -> torch.Tensor:
        """1 where the most likely class is the right one."""
        labels = data.labels[indices].to(self._device)
        return (self._logits(model, data, indices, None).argmax(-1) == labels).double()

    def _logits(
        self, model: nn.Module, data: ImageSet, indices: torch.Tensor, augment: Callable[..., Any] | None
    ) -> torch.Tensor:
        pixels = data.images(indices)
        if augment is not None:
            pixels = augment(pixels)
        pixels = (pixels - self._mean.view(-1, 1, 1)) / self._std.view(-1, 1, 1)
        logits: torch.Tensor = model(pixel_values=pixels.to(self._device)).logits
        return logits.float()


def _image_size(model_config: Any) -> tuple[int, int]:
    size = getattr(model_config, "image_size", 224)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
