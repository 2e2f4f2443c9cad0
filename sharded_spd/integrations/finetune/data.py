"""Labelled images: arrays in memory or files in folders, served batch by batch as floats in [0, 1]."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from sharded_spd.errors import ConfigError
from sharded_spd.integrations.finetune.examples import Batch, ExampleSet

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


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
    """What all sets of images have in common: a batch is `pixels` and `labels`, and every image counts 1."""

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


@dataclass(frozen=True)
class FolderImages(Images):
    """Image files, decoded and resized when they are fetched."""

    paths: Sequence[Path]
    labels: torch.Tensor
    size: tuple[int, int]
    channels: int
    lazy: bool = True

    def images(self, indices: torch.Tensor) -> torch.Tensor:
        """The images at `indices`, resized to `size` (height, width)."""
        return torch.stack([self._read(self.paths[int(index)]) for index in indices])

    def _read(self, path: Path) -> torch.Tensor:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as image:
                shaped = image.convert("L" if self.channels == 1 else "RGB").resize(self.size[::-1])
        except (OSError, UnidentifiedImageError) as error:
            raise ConfigError(f"{path}: cannot be read as an image: {error}") from None
        pixels = torch.from_numpy(np.asarray(shaped, dtype=np.float32) / 255)
        return pixels.view(*self.size, self.channels).permute(2, 0, 1)


def read_images(
    path: Path, *, key: str, size: tuple[int, int], channels: int, classes: Mapping[str, int]
) -> ImageSet:
    """Read a set of images that the setting `key` names.

    `path`: an `.npz` or `.safetensors` file with `images` and `labels`, or a folder of one folder per class.
    `size`, `channels`: what the model takes. `classes`: the checkpoint's class names, for folders.

    Raises:
        ConfigError: the file or an array is missing, or does not fit.
    """
    if not path.exists():
        raise ConfigError(f"{key}: there is no {path} (relative paths start at {Path.cwd()})")
    if path.is_dir():
        return _read_folder(path, key=key, size=size, channels=channels, classes=classes)
    if path.suffix not in (".npz", ".safetensors"):
        raise ConfigError(f"{key}: {path} is neither an .npz or .safetensors file nor a folder")
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


def _read_folder(
    path: Path, *, key: str, size: tuple[int, int], channels: int, classes: Mapping[str, int]
) -> FolderImages:
    names = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    if not names:
        raise ConfigError(f"{key}: {path} has no subfolders; wanted one per class with its images")
    strangers = [name for name in names if name not in classes]
    if strangers:
        raise ConfigError(
            f"{key}: {path} has the subfolders {', '.join(strangers[:5])}, which are no classes of "
            f"the model; it knows {', '.join(list(classes)[:10])}"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for name in names:
        found = sorted(p for p in (path / name).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        paths += found
        labels += [classes[name]] * len(found)
    if not paths:
        raise ConfigError(f"{key}: {path} has no images ({', '.join(IMAGE_SUFFIXES)}) in its subfolders")
    return FolderImages(paths, torch.tensor(labels), size, channels)
