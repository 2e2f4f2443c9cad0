"""Labelled images, served batch by batch as floats in [0, 1]; arrays in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from sharded_spd.errors import ConfigError
from sharded_spd.finetune.data.examples import Batch, ExampleSet


class ImageSet(ExampleSet, Protocol):
    """Labelled images, fetched by index."""

    @property
    def labels(self) -> torch.Tensor:
        """The class of every image, int64 `[n]`."""
        ...

    def images(self, indices: torch.Tensor) -> torch.Tensor:
        """The images at `indices` as float32 `[len(indices), channels, height, width]` in [0, 1]."""
        ...


class Images(ABC):
    """The base of image sets: a batch is `pixels` and `labels`, and every image counts 1."""

    lazy: bool = False
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def images(self, indices: torch.Tensor) -> torch.Tensor:
        """The images at `indices`."""

    def units(self, indices: torch.Tensor) -> float:
        """One for each."""
        return float(len(indices))

    def take(self, indices: torch.Tensor) -> Batch:
        """The images at `indices` and their labels."""
        return {"pixels": self.images(indices), "labels": self.labels[indices]}


@dataclass(frozen=True)
class ArrayImages(Images):
    """Images and labels in memory."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def images(self, indices: torch.Tensor) -> torch.Tensor:
        """The images at `indices`."""
        return self.pixels[indices]

    def subset(self, indices: torch.Tensor) -> ArrayImages:
        """Only the images at `indices`, in that order."""
        return ArrayImages(self.pixels[indices], self.labels[indices])


def read_arrays(path: Path, *, key: str, size: tuple[int, int], channels: int) -> ArrayImages:
    """Read the set that the setting `key` names: an `.npz` or `.safetensors` file with `images` and `labels`.

    `size`, `channels`: what the model takes.

    Raises:
        ConfigError: the file or an array is missing, or does not fit.
    """
    if path.suffix not in (".npz", ".safetensors"):
        raise ConfigError(f"{key}: {path} is neither an .npz, .safetensors or .parquet file nor a folder")
    arrays = _read_arrays(path, key=key)
    for name in ("images", "labels"):
        if name not in arrays:
            raise ConfigError(
                f"{key}: {path} has no array {name!r}, only: {', '.join(sorted(arrays)) or 'nothing'}"
            )
    return _as_set(arrays["images"], arrays["labels"], where=f"{key}: {path}", size=size, channels=channels)


def _read_arrays(path: Path, *, key: str) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: torch.from_numpy(file[name]) for name in file.files}
        from safetensors.torch import load_file

        return dict(load_file(path))
    except Exception as error:  # each format has its own exceptions for a damaged file
        raise ConfigError(f"{key}: {path} cannot be read: {error}") from None


def _as_set(
    images: torch.Tensor, labels: torch.Tensor, *, where: str, size: tuple[int, int], channels: int
) -> ArrayImages:
    if labels.ndim != 1 or labels.is_floating_point() or len(labels) != len(images):
        raise ConfigError(
            f"{where}: wanted one whole number per image as labels, got {tuple(labels.shape)} {labels.dtype} "
            f"for {len(images)} images"
        )
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    pixels = images.to(torch.float32) / scale
    if pixels.ndim == 3:  # without a channel dim
        pixels = pixels.unsqueeze(1)
    if pixels.ndim == 4 and pixels.shape[1] != channels and pixels.shape[3] == channels:
        pixels = pixels.permute(0, 3, 1, 2).contiguous()
    if pixels.ndim != 4 or pixels.shape[1:] != (channels, *size):
        raise ConfigError(
            f"{where}: the model takes {channels} x {size[0]} x {size[1]} (channels, height, width), "
            f"got an array of shape {tuple(images.shape)}"
        )
    low, high = (float(pixels.min()), float(pixels.max())) if len(pixels) else (0.0, 0.0)
    if not (low >= 0 and high <= 1):
        raise ConfigError(
            f"{where}: wanted uint8 images or floats in [0, 1], got values from {low:g} to {high:g}"
        )
    return ArrayImages(pixels, labels.to(torch.int64))
