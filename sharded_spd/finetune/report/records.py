"""A job's records: the directory of a run, its lines of metrics, and the results of its trainings."""

from __future__ import annotations

import json
import math
import os
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sharded_spd.finetune.report.tracking import PATIENCE, Tracking

ID = "test"
"""The name of the in-distribution test set among the scores."""


@dataclass(frozen=True)
class Evaluation:
    """The scores at one moment of a training: `test` and each out-of-distribution set by name.

    `scores` are by the first metric, which methods are compared by; `metrics` has all metrics of each set,
    also of `validation` where a training is stopped by it. Shares are in percent. `retained` has the accuracy
    at each task that the checkpoint could do before, which is no part of the mean over the sets.
    """

    step: int
    epoch: float
    scores: Mapping[str, float]
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    retained: Mapping[str, float] = field(default_factory=dict)

    @property
    def id(self) -> float:
        """The in-distribution score."""
        return self.scores[ID]

    @property
    def ood(self) -> float:
        """The mean over the out-of-distribution sets; NaN without any."""
        others = [score for name, score in self.scores.items() if name != ID]
        return statistics.fmean(others) if others else math.nan


@dataclass(frozen=True)
class TrainingResult:
    """One finished training; `history` starts with the zero-shot evaluation."""

    method: str
    weight_decay: float | None
    seed: int
    history: Sequence[Evaluation]
    activation_rate: float | None
    deviation: float
    samples_per_second: float
    seconds: float
    checkpoint: str | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> TrainingResult:
        """What `to_dict` gave."""
        return cls(**{**data, "history": tuple(Evaluation(**entry) for entry in data["history"])})


@dataclass(frozen=True)
class Figure:
    """A mean over seeds and its standard error (NaN with one seed)."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Mean and standard error of `values`."""
        mean, count = statistics.fmean(values), len(values)
        if count < 2 or math.isnan(mean):
            return cls(mean, math.nan)
        return cls(mean, statistics.stdev(values) / math.sqrt(count))

    def text(self, digits: int = 1) -> str:
        """`94.9 ± 0.2`, or the mean alone where there is one seed."""
        if math.isnan(self.mean):
            return "-"
        error = "" if math.isnan(self.error) else f" ± {self.error:.{digits}f}"
        return f"{self.mean:.{digits}f}{error}"


def plain_json(value: Any, *, indent: int | None = None) -> str:
    """JSON, in which a number that is none (NaN, infinity) is null."""

    def plain(found: Any) -> Any:
        if isinstance(found, float):
            return found if math.isfinite(found) else None
        if isinstance(found, Mapping):
            return {key: plain(item) for key, item in found.items()}
        return [plain(item) for item in found] if isinstance(found, (list, tuple)) else found

    return json.dumps(plain(value), indent=indent)


_RETAKEN = frozenset({"step", "layers", "evaluation", "stopped early", "trained"})
"""Events of a training that it writes again where it is resumed."""


class Recorder:
    """Writes `metrics.jsonl` line by line; without a directory, as on all ranks but the main one, nothing."""

    def __init__(self, directory: Path | None, tracking: Tracking | None = None) -> None:
        self._began = time.perf_counter()
        self._tracking, self._lock = tracking, threading.RLock()
        self._path = None if directory is None else directory / "metrics.jsonl"
        self._again = self._path is not None and self._path.is_file()
        self._file = None if self._path is None else open(self._path, "a", encoding="utf-8")
        if self._again:
            self._rewrite(lambda entry: True)

    def write(self, event: str, **fields: Any) -> None:
        """Append one line, flushed, so that a run that dies leaves what it knew."""
        with self._lock:  # a tracker's thread may warn
            if self._file is not None:
                seconds = round(time.perf_counter() - self._began, 3)
                try:
                    self._file.write(plain_json({"event": event, "seconds": seconds, **fields}) + "\n")
                    self._file.flush()
                except OSError as error:
                    self._give_up(error)
        if self._tracking is not None:
            self._tracking.record(event, fields)

    def forget(self, tags: Mapping[str, Any], *, after: int) -> None:
        """Remove what a resumed run had written of a training after this step, since it is repeated."""
        if self._again:
            self._rewrite(
                lambda entry: (
                    entry.get("event") not in _RETAKEN
                    or any(entry.get(key) != value for key, value in tags.items())
                    or entry.get("step", math.inf) <= after
                )
            )

    def _rewrite(self, keep: Callable[[Mapping[str, Any]], bool]) -> None:
        """Keep only such lines, without a truncated one; written to a temporary file and renamed."""
        if self._file is None or self._path is None:
            return
        try:
            with self._lock:
                beside = self._path.with_suffix(".part")
                with open(self._path, encoding="utf-8", errors="replace") as old:
                    with open(beside, "w", encoding="utf-8") as new:
                        new.writelines(line for line in old if _is_kept(line, keep))
                self._file.close()
                os.replace(beside, self._path)
                self._file = open(self._path, "a", encoding="utf-8")
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """A training continues even if its lines cannot be written."""
        file, self._file = self._file, None
        with suppress(OSError):
            if file is not None:
                file.close()
        warnings.warn(f"metrics.jsonl gets no more lines: {error.strerror}", stacklevel=3)

    def fail(self) -> None:
        """Give trackers the moment that is left before a run that failed is ended."""
        if self._tracking is not None:
            self._tracking.drain(patience=3.0)

    def close(self, *, patience: float = PATIENCE) -> None:
        """Close the trackers, which have `patience` seconds for it, and the file."""
        if self._tracking is not None:
            self._tracking.close(patience=patience)
        with self._lock:
            file, self._file = self._file, None
            if file is not None:
                file.close()


def _is_kept(line: str, keep: Callable[[Mapping[str, Any]], bool]) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:
        return line.endswith("\n")  # damaged in some other way: the report counts it
    return not isinstance(entry, dict) or keep(entry)


def new_directory(wanted: str) -> Path:
    """Make the directory `wanted`, or the first of `wanted-2`, `wanted-3`, ... that does not exist yet."""
    base = Path(wanted)
    number = 1
    while True:
        path = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if path.is_dir() and not any(path.iterdir()):
                return path
            number += 1
        else:
            return path
