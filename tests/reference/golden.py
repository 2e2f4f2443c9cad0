"""Reads the golden trajectories of `tests/data/golden` (see the README there)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from tests.reference.oracle import LayerOptions

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
FTP_FILES = tuple(sorted(path.stem for path in GOLDEN.glob("ftp_*.safetensors")))
SPD_FILES = tuple(sorted(path.stem for path in GOLDEN.glob("spd_*.safetensors")))


@dataclass(frozen=True, slots=True)
class Golden:
    """One trajectory; `grads[t]` lacks the layers without a gradient, `stats[name]` is `[steps, 4]`."""

    names: tuple[str, ...]
    options: dict[str, LayerOptions]
    amsgrad: bool
    zero_anchor: bool
    anchors: dict[str, Tensor]
    init: dict[str, Tensor]
    grads: list[dict[str, Tensor]]
    params: list[dict[str, Tensor]]
    stats: dict[str, Tensor]
    final_exp_avg: dict[str, Tensor]
    final_exp_avg_sq: dict[str, Tensor]


@cache
def read_golden(stem: str) -> Golden:
    """The SPD trajectory of that file name; float64."""
    with safe_open(GOLDEN / f"{stem}.safetensors", "pt") as file:
        meta = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    names = tuple(json.loads(meta["names"]))

    def under(prefix: str) -> dict[str, Tensor]:
        return {name: tensors[f"{prefix}/{name}"] for name in names if f"{prefix}/{name}" in tensors}

    options = {
        name: LayerOptions(
            lr=h["lr"], betas=(h["betas"][0], h["betas"][1]), eps=h["eps"], weight_decay=h["weight_decay"]
        )
        for name, h in json.loads(meta["hparams"]).items()
    }
    steps = range(int(meta["steps"]))
    zero = meta["anchor"] == "zero"
    anchors = {name: torch.zeros_like(w) for name, w in under("init").items()} if zero else under("anchor")
    return Golden(
        names=names,
        options=options,
        amsgrad=json.loads(meta["amsgrad"]),
        zero_anchor=zero,
        anchors=anchors,
        init=under("init"),
        grads=[under(f"grad/{t}") for t in steps],
        params=[under(f"param/{t}") for t in steps],
        stats=under("stats"),
        final_exp_avg=under("final_exp_avg"),
        final_exp_avg_sq=under("final_exp_avg_sq"),
    )


@dataclass(frozen=True, slots=True)
class FTPGolden:
    """One trajectory of Fast Trainable Projection; `momentum` None: on Adam, else on SGD."""

    names: tuple[str, ...]
    excluded: tuple[str, ...]
    lr: float
    weight_decay: float
    momentum: float | None
    k: float
    anchors: dict[str, Tensor]
    init: dict[str, Tensor]
    grads: list[dict[str, Tensor]]
    params: list[dict[str, Tensor]]


@cache
def read_ftp(stem: str) -> FTPGolden:
    """The FTP trajectory of that file name; float64."""
    with safe_open(GOLDEN / f"{stem}.safetensors", "pt") as file:
        meta = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    names = tuple(json.loads(meta["names"]))

    def under(prefix: str) -> dict[str, Tensor]:
        return {name: tensors[f"{prefix}/{name}"] for name in names if f"{prefix}/{name}" in tensors}

    hparams = json.loads(meta["hparams"])
    steps = range(int(meta["steps"]))
    return FTPGolden(
        names=names,
        excluded=tuple(json.loads(meta["exclude"])),
        lr=hparams["lr"],
        weight_decay=hparams["weight_decay"],
        momentum=hparams.get("momentum"),
        k=hparams["k"],
        anchors=under("anchor"),
        init=under("init"),
        grads=[under(f"grad/{t}") for t in steps],
        params=[under(f"param/{t}") for t in steps],
    )
