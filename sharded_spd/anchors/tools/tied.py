"""Embeddings and an output layer that are one tensor, which a checkpoint stores under either name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sharded_spd.anchors.checkpoint import Checkpoint
from sharded_spd.errors import AnchorError
from sharded_spd.safetensors_io.reader import load_json

_OUTPUT = re.compile(r"(?:.*\.)?(?:lm_head|embed_out)\.weight")
_EMBEDDING = re.compile(r"(?:.*\.)?(?:embed_tokens|word_embeddings|wte|embed_in|shared)\.weight")


def match_tied(start: Checkpoint, end: Checkpoint, names: Mapping[str, str]) -> dict[str, str]:
    """The one tensor of `end` that is a tensor of `start` under the other name, as `match_names` gives them.

    Only where the configuration of `end` says that the two are tied, each checkpoint has one of them, and
    the shapes agree.
    """
    pairs = []
    for ours, theirs in ((_OUTPUT, _EMBEDDING), (_EMBEDDING, _OUTPUT)):
        here, there = (
            [n for n in c.files() if ours.fullmatch(n) or theirs.fullmatch(n)] for c in (end, start)
        )
        if len(here) == len(there) == 1 and ours.fullmatch(here[0]) and theirs.fullmatch(there[0]):
            pairs.append((here[0], there[0]))
    return {
        key: other
        for key, other in pairs
        if key not in names
        and other not in names.values()
        and end.tensor(key).shape == start.tensor(other).shape
        and _is_tied(end)
    }


def _is_tied(checkpoint: Checkpoint) -> bool:
    path = checkpoint.folder / "config.json"
    try:
        config: Mapping[str, Any] = load_json(path.read_bytes(), str(path))
    except (OSError, AnchorError):  # nothing says so
        return False
    text = config.get("text_config")
    configs = (config, text if isinstance(text, dict) else {})
    return any(found.get("tie_word_embeddings") is True for found in configs)
