"""The events of a run as figures of trackers, each training a run of its own there."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sharded_spd.integrations.finetune.trackers import JSONL, TRACKERS, Identities, Tracker

_STEP = ("loss", "lr", "grad_norm", "activation_rate", "deviation", "samples_per_second", "epoch")


class Tracking:
    """Hands events on to the trackers; one that fails is warned about once and left out from then on."""

    def __init__(self, names: Sequence[str], directory: Path, config: Mapping[str, Any]) -> None:
        self._names = [name for name in dict.fromkeys(names) if name != JSONL]
        self._directory, self._config = directory, config
        self._open: dict[str, Tracker] = {}
        self._title: str | None = None
        self._first = 0
        self._zero_shot: dict[int, Mapping[str, Any]] = {}
        self._known = Identities(directory)

    def record(self, event: str, fields: Mapping[str, Any]) -> None:
        """Take an event of `Recorder.write`."""
        if not self._names:
            return
        if event == "zero-shot":
            self._zero_shot[int(fields["seed"])] = fields
        elif event == "pretrain":
            self._log("pretrain", fields["step"], {f"train/{k}": fields[k] for k in ("loss", "lr")}, fields)
        elif event == "resumed":
            self._first = int(fields["step"]) + 1
        elif event == "step":
            values = {f"train/{k}": fields[k] for k in _STEP if fields.get(k) is not None}
            self._log(title_of(fields), fields["step"], values, fields)
        elif event == "evaluation":
            self._log(title_of(fields), fields["step"], _by_set(fields), fields)
        elif event in ("trained", "validation", "end"):
            self.close()

    def _log(self, title: str, step: int, values: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        finite = {k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)}
        if title != self._title:
            self.close()
            self._begin(title, tags)
        self._each("log", step, finite)

    def _begin(self, title: str, tags: Mapping[str, Any]) -> None:
        self._title = title
        config = {
            **flat(self._config),
            **{k: tags[k] for k in ("method", "weight_decay", "seed") if k in tags},
        }
        first, self._first = self._first, 0
        for name in list(self._names):
            try:
                self._open[name] = TRACKERS[name](self._directory, title, config, first, self._known)
            except Exception as error:  # whatever a library raises, the training goes on
                self._drop(name, error)
        if tags.get("purpose") == "compare" and first == 0 and self._zero_shot:
            seen = self._zero_shot.get(int(tags["seed"]), next(iter(self._zero_shot.values())))
            self._each("log", 0, _by_set(seen))

    def _each(self, method: str, *arguments: Any) -> None:
        for name, tracker in list(self._open.items()):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # as above
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        self._names.remove(name)
        self._open.pop(name, None)
        warnings.warn(
            f"track: {name} failed and gets nothing more of this run ({type(error).__name__}: "
            f"{error!s:.300}); the training goes on, metrics.jsonl has its figures",
            stacklevel=2,
        )

    def close(self) -> None:
        """End the training that is open."""
        self._each("close")
        self._open, self._title = {}, None


def title_of(tags: Mapping[str, Any]) -> str:
    """`spd λ=2 seed 0`, with `choosing` before it where a strength is being chosen."""
    strength = "" if tags.get("weight_decay") is None else f" λ={tags['weight_decay']:g}"
    choosing = "choosing " if tags.get("purpose") == "select" else ""
    return f"{choosing}{tags['method']}{strength} seed {tags['seed']}"


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `train.lr`, values as texts or numbers."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found.update(flat(value, f"{prefix}{key}."))
        else:
            plain = isinstance(value, (str, int, float, type(None)))
            found[f"{prefix}{key}"] = value if plain else json.dumps(value)
    return found


def _by_set(found: Mapping[str, Any]) -> dict[str, Any]:
    metrics: Mapping[str, Mapping[str, Any]] = found["metrics"]
    sets = {f"eval/{data}/{name}": v for data, own in metrics.items() for name, v in own.items()}
    return sets | {f"eval/retained/{name}": v for name, v in (found.get("retained") or {}).items()}
