"""Image classification with the models that transformers knows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sharded_spd.finetune.config import JobConfig
from sharded_spd.finetune.data.examples import Batch, Splits
from sharded_spd.finetune.data.sources import SOURCES, ImageSpec, load_splits, pick
from sharded_spd.finetune.metrics import Outcome
from sharded_spd.finetune.tasks.loading import read_config
from sharded_spd.finetune.tasks.models import ModelTask

_CARRIED = ("preprocessor_config.json", "processor_config.json")


class ImageClassification(ModelTask):
    """A Hugging Face image classifier and labelled images; scored by accuracy."""

    auto = "AutoModelForImageClassification"
    head = ("classifier", "head", "fc")
    metrics: Sequence[str] = ("accuracy", "f1", "loss")

    def __init__(self, config: JobConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.new_head = bool(config.classes)
        # Until a checkpoint says otherwise: [0, 1] becomes [-1, 1].
        self._mean = self._std = torch.tensor([0.5])
        self._loaded_from: Path | None = None
        self._classes: tuple[str, ...] | None = None
        self._size = (224, 224)

    def model_config(self, directory: Path) -> Any:
        """The checkpoint's own, with other classes if its are not the data's; reads the preprocessing too."""
        trust = self._config.trust_remote_code
        config = read_config(directory, trust=trust)
        if self._classes is None:
            self._classes = self._config.classes or self._seen(config.label2id)
            self.new_head = bool(self._classes)
        if self._classes:
            names = dict(enumerate(self._classes))
            settings = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
            config = read_config(directory, trust=trust, **settings)
        file = directory / "preprocessor_config.json"
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            if found.get("do_normalize", True) and "image_mean" in found:
                self._mean = torch.tensor(found["image_mean"], dtype=torch.float32)
                self._std = torch.tensor(found["image_std"], dtype=torch.float32)
        self._loaded_from = directory
        return config

    def _seen(self, known: Mapping[str, int]) -> tuple[str, ...]:
        """The training set's classes; none if the checkpoint knows them all, or they are numbers."""
        if self._config.data.name != "files":
            return ()
        options, _ = pick(SOURCES, self._config.data)
        found = options.classes()
        return () if found is None or set(found) <= set(known) else tuple(found)

    def add_files(self, folder: Path) -> None:
        """The preprocessing: that which the checkpoint came with, else what was done here."""
        for name in _CARRIED:
            if self._loaded_from is not None and (self._loaded_from / name).is_file():
                shutil.copy2(self._loaded_from / name, folder / name)
        if (folder / _CARRIED[0]).is_file():
            return
        height, width = self._size
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
        (folder / _CARRIED[0]).write_text(json.dumps(settings, indent=2), encoding="utf-8")

    def splits(self, model_config: Any, *, seed: int) -> Splits:
        """The sets of the run with `seed`."""
        self._size = _image_size(model_config)
        classes = {str(name): int(index) for name, index in model_config.label2id.items()}
        spec = ImageSpec(self._size, int(getattr(model_config, "num_channels", 3)), classes)
        return load_splits(self._config.data, spec=spec, seed=seed)

    def losses(
        self, model: nn.Module, batch: Batch, *, augment: Callable[..., Any] | None = None
    ) -> torch.Tensor:
        """Cross-entropy of each image."""
        if augment is not None:
            batch = {**batch, "pixels": augment(batch["pixels"])}
        return self.outcome(model, batch).losses

    def outcome(self, model: nn.Module, batch: Batch) -> Outcome:
        """What the model makes of each image."""
        pixels = batch["pixels"]
        mean, std = (values.to(pixels.device).view(-1, 1, 1) for values in (self._mean, self._std))
        pixels = (pixels - mean) / std
        logits: torch.Tensor = model(pixel_values=pixels.to(self._device)).logits
        return Outcome(logits.float(), batch["labels"].to(self._device))


def _image_size(model_config: Any) -> tuple[int, int]:
    size = getattr(model_config, "image_size", 224)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
