"""Where a job's images come from: the digits that scikit-learn ships, or the user's own files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from sharded_spd.config.loading import build, choice, wrong
from sharded_spd.errors import ConfigError
from sharded_spd.finetune.config import NamedBlock
from sharded_spd.finetune.data.corruptions import seven_corruptions
from sharded_spd.finetune.data.examples import Splits
from sharded_spd.finetune.data.image_files import (
    ImageColumns,
    class_folders,
    is_table,
    read_folder,
    read_table,
    table_classes,
)
from sharded_spd.finetune.data.images import ArrayImages, Images, ImageSet, read_arrays

L = TypeVar("L")


@dataclass(frozen=True)
class ImageSpec:
    """What the model takes: image size (height, width), channels, and its classes by name."""

    size: tuple[int, int]
    channels: int
    classes: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class DigitsOptions:
    """How one permutation by `split_seed` splits the 1797 digits, in this order; the rest is the test.

    `classes`: of the pool, the validation and the test only these; the test digits of the others are then the
    one OOD set, `other classes`. Empty: all of them, and seven corruptions of the test digits as OOD sets.
    """

    pretrain: int = 300
    pool: int = 250
    validation: int = 400
    train: int = 200
    split_seed: int = 0
    corruption_seed: int = 7
    classes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not {*self.classes} < {*range(10)}:
            raise wrong("classes", "some of the digits 0 to 9, not all", self.classes)
        for name in ("pretrain", "pool", "validation", "train"):
            if getattr(self, name) < 1:
                raise wrong(name, "1 or more images", getattr(self, name))
        if self.train > self.pool:
            raise ConfigError(f"train: {self.train} images cannot be drawn from a pool of {self.pool}")
        if self.pretrain + self.pool + self.validation >= 1797:
            raise ConfigError("pretrain + pool + validation must leave some of the 1797 digits for the test")


@dataclass(frozen=True, kw_only=True)
class FilesOptions:
    """The user's sets: folders of classes, parquet files, or arrays in `.npz` or `.safetensors` files.

    `train_images`: draw only that many of `train`, another draw per seed (all if null). `image`, `label`: the
    columns of parquet files.
    """

    train: str
    test: str
    validation: str | None = None
    ood: Mapping[str, str] = field(default_factory=dict)
    train_images: int | None = None
    image: str = "image"
    label: str = "label"

    @property
    def columns(self) -> ImageColumns:
        """Of parquet files."""
        return ImageColumns(self.image, self.label)

    def classes(self) -> list[str] | None:
        """Those of the training set by name, in order; None where it has numbers only."""
        path = Path(self.train)
        if path.is_dir() and not is_table(self.train):
            return [folder.name for folder in class_folders(path, key="data.train")]
        if not is_table(self.train):
            return None
        found = table_classes(self.train, key="data.train", columns=self.columns)
        if all(isinstance(label, int) for label in found):
            return None
        return sorted(str(label) for label in found)


def load_splits(block: NamedBlock, *, spec: ImageSpec, seed: int) -> Splits:
    """The sets of a job whose `data` block is `block`, for a model that takes `spec`, in the run with `seed`.

    Raises:
        ConfigError: an unknown source or option, a file that is missing or does not fit the model.
    """
    options, load = pick(SOURCES, block)
    return load(options, spec, seed)


def pick(sources: Mapping[str, tuple[type[Any], L]], block: NamedBlock) -> tuple[Any, L]:
    """The options of the block `data`, checked, and what loads the sets of such a source.

    Raises:
        ConfigError: an unknown source or option, with the nearest name.
    """
    if block.name not in sources:
        raise choice("data", block.name, list(sources))
    options, load = sources[block.name]
    return build(options, block.options, "data"), load


def _digits(options: DigitsOptions, spec: ImageSpec, seed: int) -> Splits:
    from sklearn.datasets import load_digits

    if (spec.channels, *spec.size) != (1, 8, 8) or len(spec.classes) != 10:
        raise ConfigError(
            f"data: the digits are 1 x 8 x 8 in 10 classes, but the checkpoint takes "
            f"{spec.channels} x {spec.size[0]} x {spec.size[1]} in {len(spec.classes)}"
        )
    raw = load_digits()
    every = ArrayImages(
        torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16,
        torch.tensor(raw.target, dtype=torch.int64),
    )
    order = torch.randperm(len(every.labels), generator=torch.Generator().manual_seed(options.split_seed))
    sizes = [options.pretrain, options.pool, options.validation]
    pretrain, pool, validation, test = order.split([*sizes, len(order) - sum(sizes)])
    ood = {}
    if options.classes:
        wanted = torch.isin(every.labels, torch.tensor(options.classes))
        ood["other classes"] = every.subset(test[~wanted[test]])
        pool, validation, test = pool[wanted[pool]], validation[wanted[validation]], test[wanted[test]]
        if options.train > len(pool):
            raise ConfigError(
                f"train: {options.train} images cannot be drawn from {len(pool)} of data.classes"
            )
    tested = every.subset(test)
    if not ood:
        corruptions = seven_corruptions(seed=options.corruption_seed)
        ood = {n: ArrayImages(change(tested.pixels), tested.labels) for n, change in corruptions.items()}
    return Splits(
        train=every.subset(pool[_draw(len(pool), options.train, seed)]),
        validation=every.subset(validation),
        test=tested,
        ood=ood,
        pretrain=every.subset(pretrain),
    )


def _files(options: FilesOptions, spec: ImageSpec, seed: int) -> Splits:
    def read(path: str, key: str) -> ImageSet:
        found = _read(options, path, f"data.{key}", spec)
        _check_labels(found, key=f"data.{key}", path=path, classes=len(spec.classes))
        return found

    train = read(options.train, "train")
    if options.train_images is not None:
        if not 0 < options.train_images <= len(train.labels):
            raise wrong("data.train_images", f"1 to {len(train.labels)} images", options.train_images)
        train = _Drawn(train, _draw(len(train.labels), options.train_images, seed))
    return Splits(
        train=train,
        test=read(options.test, "test"),
        validation=None if options.validation is None else read(options.validation, "validation"),
        ood={name: read(path, f"ood.{name}") for name, path in options.ood.items()},
    )


def _read(options: FilesOptions, path: str, key: str, spec: ImageSpec) -> ImageSet:
    fits: dict[str, Any] = {"key": key, "size": spec.size, "channels": spec.channels}
    if is_table(path):
        return read_table(path, **fits, classes=spec.classes, columns=options.columns)
    if not Path(path).exists():
        raise ConfigError(f"{key}: there is no {path} (relative paths start at {Path.cwd()})")
    if Path(path).is_dir():
        return read_folder(Path(path), **fits, classes=spec.classes)
    return read_arrays(Path(path), **fits)


def _check_labels(images: ImageSet, *, key: str, path: str, classes: int) -> None:
    labels = images.labels
    if len(labels) == 0:
        raise ConfigError(f"{key}: {path} holds no images")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ConfigError(
            f"{key}: {path} has labels from {low} to {high}, but the model has {classes} classes "
            f"(0 to {classes - 1}); name yours under classes for a new head"
        )


def _draw(count: int, wanted: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(1000 + seed))[:wanted]


class _Drawn(Images):
    """Some of the images of another set."""

    def __init__(self, whole: ImageSet, indices: torch.Tensor) -> None:
        self._whole, self._indices = whole, indices
        self.lazy = whole.lazy
        self.labels = whole.labels[indices]

    def images(self, indices: torch.Tensor) -> torch.Tensor:
        return self._whole.images(self._indices[indices])


SOURCES: Mapping[str, tuple[type[Any], Callable[[Any, ImageSpec, int], Splits]]] = {
    "digits": (DigitsOptions, _digits),
    "files": (FilesOptions, _files),
}
