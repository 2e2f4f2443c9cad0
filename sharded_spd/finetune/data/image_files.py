"""Images in files: folders of classes, and tables with a column of images; decoded when they are fetched."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sharded_spd.errors import ConfigError
from sharded_spd.finetune.data.images import Images
from sharded_spd.finetune.data.rows import FORMATS, find_files, import_datasets

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class ImageColumns:
    """The columns of a table of images."""

    image: str = "image"
    label: str = "label"


def decode(source: Path | bytes, *, where: str, size: tuple[int, int], channels: int) -> torch.Tensor:
    """An image as float32 `[channels, *size]` in [0, 1], resized.

    Raises:
        ConfigError: it is none, is broken, or has values of an unknown range; `where` says which one.
    """
    from PIL import Image

    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
            if image.mode.startswith("I;16"):  # convert() would clip it at 255
                sixteen = np.asarray(image, dtype=np.float32)
                image = Image.fromarray((sixteen / 257).round().astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError(f"its mode {image.mode} has no range; wanted 8 or 16 bits per channel")
            shaped = image.convert("L" if channels == 1 else "RGB").resize(size[::-1])
    except Exception as error:  # Pillow's readers raise whatever a broken file leads them to
        text = "it is empty" if _size(source) == 0 else str(error)
        raise ConfigError(f"{where}: cannot be read as an image: {text}") from None
    pixels = torch.from_numpy(np.asarray(shaped, dtype=np.float32) / 255)
    return pixels.view(*size, channels).permute(2, 0, 1)


def _size(source: Path | bytes) -> int:
    try:
        return source.stat().st_size if isinstance(source, Path) else len(source)
    except OSError:
        return -1


@dataclass(frozen=True)
class FolderImages(Images):
    """Image files of the set `key`."""

    paths: Sequence[Path]
    labels: torch.Tensor
    size: tuple[int, int]
    channels: int
    key: str
    lazy: bool = True

    def images(self, indices: torch.Tensor) -> torch.Tensor:
        """The images at `indices`, resized to `size` (height, width)."""
        return torch.stack([self._read(self.paths[index]) for index in indices.tolist()])

    def _read(self, path: Path) -> torch.Tensor:
        return decode(path, where=f"{self.key}: {path}", size=self.size, channels=self.channels)


def class_folders(path: Path, *, key: str) -> list[Path]:
    """The folders of a folder, one per class, without hidden ones.

    Raises:
        ConfigError: there are none, or images lie beside them.
    """
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith((".", "__")))
    stray = next((entry for entry in entries if entry.suffix.lower() in IMAGE_SUFFIXES), None)
    if stray is not None and stray.is_file():
        raise ConfigError(f"{key}: {stray} lies in no folder of a class; wanted {path}/CLASS/{stray.name}")
    folders = [entry for entry in entries if entry.is_dir()]
    if not folders:
        raise ConfigError(f"{key}: {path} has no subfolders; wanted one per class with its images")
    return folders


def read_folder(
    path: Path, *, key: str, size: tuple[int, int], channels: int, classes: Mapping[str, int]
) -> FolderImages:
    """The images of a folder of one folder per class, at any depth in it.

    Raises:
        ConfigError: no images, or a class that the model does not know.
    """
    paths: list[Path] = []
    labels: list[int] = []
    for folder in class_folders(path, key=key):
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if found and folder.name not in classes:
            raise _unseen(f"{key}: {folder}", folder.name, classes)
        paths += found
        labels += [classes[folder.name]] * len(found) if found else []
    if not paths:
        raise ConfigError(f"{key}: {path} has no images ({', '.join(IMAGE_SUFFIXES)}) in its subfolders")
    return FolderImages(paths, torch.tensor(labels), size, channels, key)


def _unseen(where: str, label: object, classes: Mapping[str, int]) -> ConfigError:
    known = ", ".join(list(classes)[:10]) + (", ..." if len(classes) > 10 else "")
    return ConfigError(f"{where}: the label {label!r} is none of the model's classes ({known})")


@dataclass(frozen=True)
class TableImages(Images):
    """Rows of parquet files, which `datasets` keeps on disk."""

    tables: Sequence[tuple[Path, Any]]
    labels: torch.Tensor
    size: tuple[int, int]
    channels: int
    key: str
    column: str
    lazy: bool = True

    def images(self, indices: torch.Tensor) -> torch.Tensor:
        """The images at `indices`, resized to `size` (height, width)."""
        return torch.stack([self._read(index) for index in indices.tolist()])

    def _read(self, index: int) -> torch.Tensor:
        ends = list(accumulate(len(table) for _, table in self.tables))
        which = next(number for number, end in enumerate(ends) if index < end)
        file, table = self.tables[which]
        row = index - (ends[which] - len(table))
        where = f"{self.key}: {file}, row {row + 1}"
        found = table[row][self.column]
        content = found.get("bytes") if isinstance(found, Mapping) else found
        if content is None and isinstance(found, Mapping) and found.get("path"):
            content = file.parent / str(found["path"])
        if not isinstance(content, (bytes, Path)):
            raise ConfigError(f"{where}: column {self.column!r} holds no image but {type(found).__name__}")
        return decode(content, where=where, size=self.size, channels=self.channels)


def read_table(
    path: str,
    *,
    key: str,
    size: tuple[int, int],
    channels: int,
    classes: Mapping[str, int],
    columns: ImageColumns,
) -> TableImages:
    """The images of parquet files; `path`: one, a folder or a pattern.

    Raises:
        ConfigError: a file that cannot be read, a missing column, a label that the model does not know.
    """
    tables = list(_tables(path, key=key, columns=columns))
    labels = []
    for file, table in tables:
        for row, label in enumerate(_labels(table, columns), start=1):
            number = classes.get(str(label))
            if number is None and isinstance(label, int) and 0 <= label < len(classes):
                number = label if all(not name.lstrip("-").isdigit() for name in classes) else None
            if number is None:
                raise _unseen(f"{key}: {file}, row {row}", label, classes)
            labels.append(number)
    if not labels:
        raise ConfigError(f"{key}: {path} holds no rows")
    return TableImages(tables, torch.tensor(labels), size, channels, key, columns.image)


def table_classes(path: str, *, key: str, columns: ImageColumns) -> set[str | int]:
    """The labels of parquet files."""
    return {
        label for _, table in _tables(path, key=key, columns=columns) for label in _labels(table, columns)
    }


def is_table(path: str) -> bool:
    """Whether a path names parquet files."""
    if Path(path).is_dir():
        return any(file.suffix == ".parquet" for file in Path(path).iterdir())
    return path.endswith(".parquet")


def _tables(path: str, *, key: str, columns: ImageColumns) -> Iterator[tuple[Path, Any]]:
    datasets = import_datasets()
    for file in find_files(path, key=key):
        if FORMATS[file.suffix] != "parquet":
            raise ConfigError(f"{key}: {file} is no parquet file")
        try:
            table = datasets.load_dataset("parquet", data_files=[str(file)], split="train")
        except Exception as error:  # datasets passes on what its readers raise
            while error.__cause__ is not None:
                error = error.__cause__  # type: ignore[assignment]
            text = " ".join(str(error).split())
            raise ConfigError(f"{key}: {file} cannot be read as parquet: {text:.300}") from None
        for column in (columns.image, columns.label):
            if column not in table.column_names:
                names = ", ".join(table.column_names)
                raise ConfigError(f"{key}: {file}: no column {column!r}, only: {names}")
        if isinstance(table.features[columns.image], datasets.Image):
            table = table.cast_column(columns.image, datasets.Image(decode=False))
        yield file, table


def _labels(table: Any, columns: ImageColumns) -> list[str | int]:
    names = getattr(table.features[columns.label], "names", None)  # ClassLabel's
    found = list(table[columns.label])
    return found if names is None else [names[n] if n is not None and n >= 0 else n for n in found]
