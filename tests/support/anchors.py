"""An anchor with a manifest, ways to damage it, and a model that is bound to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sharded_spd import SPDConfig, attach
from sharded_spd.anchors import AnchorStore
from sharded_spd.anchors.tools.build import add_manifest
from sharded_spd.config import AnchorConfig
from sharded_spd.projection.projector import Projector
from sharded_spd.safetensors_io.reader import read_header
from tests.support.local import LAMBDA, LR
from tests.support.models import Probe

NAME = "model.safetensors"


def tensors() -> dict[str, torch.Tensor]:
    """Two of one shape, one of more than the sampled blocks; beside them what no layer is anchored at."""
    torch.manual_seed(3)
    return {
        "a": torch.randn(24, 16),
        "b": torch.randn(24, 16),
        "big": torch.randn(200, 200),
        "narrow": torch.randn(9).bfloat16(),
        "wide": torch.randn(5, dtype=torch.float64),
    }


BESIDE = {"ids": torch.arange(600), "mask": torch.ones(3, dtype=torch.bool), "empty": torch.zeros(0, 4)}


def make_anchor(path: Path) -> Path:
    """A directory with these tensors and their manifest."""
    path.mkdir()
    save_file({**tensors(), **BESIDE}, path / NAME)
    add_manifest(str(path))
    return path


def make_model(start: dict[str, torch.Tensor] | None = None) -> Probe:
    """Of these tensors."""
    return Probe(tensors() if start is None else start)


def bind_to(
    folder: Path | str | AnchorStore, start: dict[str, torch.Tensor] | None = None, **anchor: str
) -> Projector:
    """Attach to Adam over a fresh model, anchored at `folder`."""
    probe = make_model(start)
    config = SPDConfig(weight_decay=LAMBDA, anchor=AnchorConfig(source=folder, **anchor))
    return attach(torch.optim.Adam(probe.parameters(), lr=LR), probe, config)


def flip(path: Path, key: str, byte: int) -> None:
    """Change one bit of a tensor's byte."""
    content = bytearray(path.read_bytes())
    content[read_header(str(path))[key].begin + byte] ^= 1
    path.write_bytes(content)


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Save other tensors in place of a file's."""
    save_file(change(load_file(path)), path)
