"""Images in folders and in parquet files: what is read, and what is wrong with a file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sharded_spd.config.loading import build
from sharded_spd.errors import ConfigError
from sharded_spd.finetune.config import NamedBlock
from sharded_spd.finetune.data.sources import FilesOptions, ImageSpec, load_splits

SPEC = ImageSpec((4, 4), 3, {"bright": 0, "dark": 1})


def png(value: int, *, mode: str = "L") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (6, 5), value).save(file, format="PNG")
    return file.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def read(train: Path, test: Path | None = None, **settings: Any) -> Any:
    block = NamedBlock(name="files", options={"train": str(train), "test": str(test or train), **settings})
    return load_splits(block, spec=SPEC, seed=0).train


def means(images: Any) -> list[float]:
    return [float(pixels.mean()) for pixels in images.take(torch.arange(len(images)))["pixels"]]


def test_folders_are_read_at_any_depth_and_without_what_is_hidden(tmp_path: Path) -> None:
    write(tmp_path / "bright" / "a" / "b.PNG", png(255))
    write(tmp_path / "dark" / "2.png", png(51))
    write(tmp_path / "dark" / "3.png", png(0x3333, mode="I;16"))
    write(tmp_path / "dark" / "notes.txt", b"of no interest")
    write(tmp_path / ".cache" / "x.png", png(0))
    write(tmp_path / "README.md", b"neither")
    found = read(tmp_path)
    assert found.labels.tolist() == [0, 1, 1]
    assert found.images(torch.tensor([1])).shape == (1, 3, 4, 4)
    assert means(found) == pytest.approx([1.0, 0.2, 0.2])
    assert build(FilesOptions, {"train": str(tmp_path), "test": "x"}, "data").classes() == ["bright", "dark"]


def broken() -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, format="PNG")
    return file.getvalue()[:2000]


@pytest.mark.parametrize(
    ("file", "content", "wanted"),
    [
        ("dark/1.png", b"no picture", "cannot be read as an image: cannot identify"),
        ("dark/1.png", b"", "cannot be read as an image: it is empty"),
        ("dark/1.png", broken(), "cannot be read as an image: "),
        ("dark/1.tif", b"", "cannot be read as an image: it is empty"),
        ("dark/1.jpg", png(3)[:30], "cannot be read as an image: "),
        ("cats/1.png", png(3), "the label 'cats' is none of the model's classes (bright, dark)"),
        ("1.png", png(3), "lies in no folder of a class"),
        ("dark/1.txt", b"", "has no images (.png"),
        ("1.txt", b"", "has no subfolders"),
    ],
)
def test_a_wrong_image_is_one_sentence(file: str, content: bytes, wanted: str, tmp_path: Path) -> None:
    path = write(tmp_path / file, content)

    def take() -> None:
        means(read(tmp_path))

    with pytest.raises(ConfigError) as raised:
        take()
    text = str(raised.value)
    assert text.startswith("data.train: ")
    assert wanted in text
    assert "\n" not in text
    assert str(path if "image:" in wanted or "lies in" in wanted else tmp_path) in text


def write_table(path: Path, rows: list[dict[str, Any]], *, features: Any = None) -> Path:
    import datasets

    datasets.Dataset.from_list(rows, features=features).to_parquet(str(path))
    return path


def test_parquet_holds_the_same_images(tmp_path: Path) -> None:
    """As the hub has them, with names of labels; and as plain bytes, with labels as text."""
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "bright"])}
    )
    rows = [
        {"image": {"bytes": png(51), "path": None}, "label": 0},
        {"image": {"bytes": png(255)}, "label": 1},
    ]
    hub = write_table(tmp_path / "hub" / "a.parquet", rows, features=features)
    plain = [{"photo": png(51), "kind": "dark"}, {"photo": png(255), "kind": "bright"}]
    other = write_table(tmp_path / "b.parquet", plain)
    for found in (read(hub), read(hub.parent), read(other, image="photo", label="kind")):
        assert found.lazy
        assert found.labels.tolist() == [1, 0]
        assert means(found) == pytest.approx([0.2, 1.0])
    options = build(FilesOptions, {"train": str(hub), "test": "x"}, "data")
    assert options.classes() == ["bright", "dark"]


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        (
            [{"image": png(1), "label": "dark"}, {"image": png(1), "label": "cat"}],
            "row 2: the label 'cat' is none",
        ),
        ([{"image": png(1), "label": 2}], "row 1: the label 2 is none of the model's classes"),
        ([{"image": png(1), "label": None}], "row 1: the label None is none of the model's classes"),
        ([{"image": png(1), "kind": 1}], "no column 'label', only: image, kind"),
        ([{"image": png(1), "label": 1}, {"image": b"x", "label": 1}], "row 2: cannot be read as an image"),
        ([{"image": "a.png", "label": 1}], "row 1: column 'image' holds no image but str"),
        (None, "cannot be read as parquet"),
    ],
)
def test_a_wrong_table_is_one_sentence(
    rows: list[dict[str, Any]] | None, wanted: str, tmp_path: Path
) -> None:
    file = tmp_path / "t.parquet"
    if rows is None:
        write(file, b"PAR1 not really")
    else:
        write_table(file, rows)

    def take() -> None:
        means(read(file))

    with pytest.raises(ConfigError) as raised:
        take()
    assert str(raised.value).startswith(f"data.train: {file}")
    assert wanted in str(raised.value)
