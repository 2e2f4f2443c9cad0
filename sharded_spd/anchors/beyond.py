"""Layers of a checkpoint beyond the model proper: blocks that predict several tokens, or draft them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sharded_spd.errors import AnchorError
from sharded_spd.safetensors_io.reader import load_json

_LAYER = re.compile(r"((?:.*\.)?(?:layers?|h|blocks?)\.)(\d+)\..*")
_DEPTHS = frozenset(
    "num_hidden_layers n_layer n_layers num_layers num_decoder_layers encoder_layers decoder_layers "
    "depth".split()
)


def beyond(strays: Sequence[str], claimed: Iterable[str], folder: Path) -> list[str]:
    """Those of `strays` beyond the last layer, according to config.json in the checkpoint's folder.

    It must give exactly the model's number of layers (`claimed` are the model's tensors).
    """
    ends: dict[str, int] = {}
    for match in map(_LAYER.fullmatch, claimed):
        if match is not None:
            ends[match[1]] = max(ends.get(match[1], 0), int(match[2]) + 1)
    depths = set(_depths(read_config(folder)))
    found = []
    for name in strays:
        match = _LAYER.fullmatch(name)
        if match is not None and ends.get(match[1]) in depths and int(match[2]) >= ends[match[1]]:
            found.append(name)
    return found


def read_config(folder: Path) -> Mapping[str, Any]:
    """The contents of config.json in a folder; empty if there is none."""
    path = folder / "config.json"
    try:
        return load_json(path.read_bytes(), str(path))
    except (OSError, AnchorError):  # nothing says so
        return {}


def _depths(config: Mapping[str, Any]) -> Iterator[int]:
    for key, value in config.items():
        if key in _DEPTHS and type(value) is int:
            yield value
        elif isinstance(value, dict):  # of the text or vision part
            yield from _depths(value)
