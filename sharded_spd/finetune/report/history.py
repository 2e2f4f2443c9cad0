"""A run read from its directory: metrics.jsonl and config.json of a finished or interrupted run."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sharded_spd.errors import ConfigError
from sharded_spd.finetune.report.records import Evaluation, TrainingResult
from sharded_spd.finetune.report.tracking import method_of, title_of


@dataclass
class Course:
    """One training as it went: its tags, and by step its figures, scores and the deviation of each layer."""

    tags: Mapping[str, Any]
    steps: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    layers: dict[int, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    trained: Mapping[str, Any] | None = None

    @property
    def title(self) -> str:
        """As trackers have it."""
        return title_of(self.tags)

    @property
    def method(self) -> str:
        """The title without the seed."""
        return method_of(self.tags)

    def forget_after(self, step: int) -> None:
        """A resumed training takes its steps from here on again."""
        for found in (self.steps, self.evaluations, self.layers):
            for later in [s for s in found if s > step]:
                del found[later]

    def result(self, zero_shot: Evaluation | None) -> TrainingResult:
        """What the training came to, as far as it went."""
        history = {0: zero_shot, **self.evaluations} if zero_shot is not None else dict(self.evaluations)
        last = self.steps[max(self.steps)] if self.steps else {}
        rates = [s["activation_rate"] for s in self.steps.values() if s.get("activation_rate") is not None]
        known = self.trained or {}
        return TrainingResult(
            method=self.tags["method"],
            weight_decay=self.tags["weight_decay"],
            seed=self.tags["seed"],
            history=tuple(history[step] for step in sorted(history)),
            activation_rate=known.get("activation_rate", statistics.fmean(rates) if rates else None),
            deviation=_number(known.get("deviation", last.get("deviation"))),
            samples_per_second=_number(known.get("samples_per_second", last.get("samples_per_second"))),
            seconds=_number(known.get("seconds")),
            checkpoint=known.get("checkpoint"),
        )


@dataclass
class History:
    """Everything that a run has written down."""

    directory: Path
    config: Mapping[str, Any]
    courses: list[Course]
    zero_shot: Mapping[int, Evaluation]
    run: Mapping[str, Any]
    warnings: list[str]
    end: Mapping[str, Any] | None
    seconds: float
    damaged: int

    def results(self) -> list[TrainingResult]:
        """The trainings that were evaluated at least once, finished or not."""
        first = next(iter(self.zero_shot.values()), None)
        found = [c.result(self.zero_shot.get(int(c.tags["seed"]), first)) for c in self.compared()]
        return [result for result in found if result.history]

    def compared(self) -> list[Course]:
        """Without the trainings that chose a strength."""
        return [c for c in self.courses if c.tags["purpose"] == "compare"]


def read_history(directory: Path) -> History:
    """Read a run's directory; lines that are no JSON, as a run that was killed may leave, are counted.

    Raises:
        ConfigError: a directory that is no run.
    """
    try:
        lines = (directory / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ConfigError(
            f"{directory} is no run: metrics.jsonl cannot be read ({error.strerror}); give a run's "
            "output folder"
        ) from None
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    found = History(directory, config if isinstance(config, dict) else {}, [], {}, {}, [], None, 0.0, 0)
    courses: dict[str, Course] = {}
    before = latest = 0.0
    for line in lines:
        try:
            entry = json.loads(line)
            if entry["event"] == "run":  # begun, or resumed: the clock starts at zero again
                before, latest = before + latest, 0.0
            if entry["event"] != "trained":  # whose seconds are those of the training
                latest = max(latest, float(entry["seconds"]))
            _take(found, courses, entry)
        except (ValueError, KeyError, TypeError, AttributeError):
            found.damaged += 1
    found.courses, found.seconds = list(courses.values()), before + latest
    return found


def _take(history: History, courses: dict[str, Course], entry: Mapping[str, Any]) -> None:
    event = entry["event"]
    if event == "zero-shot":
        history.zero_shot = {
            **history.zero_shot,
            int(entry["seed"]): _evaluation({**entry, "step": 0, "epoch": 0.0}),
        }
    elif event == "run":
        history.run, history.end = entry, None
    elif event == "warning":
        history.warnings.append(str(entry["text"]))
    elif event == "end":
        history.end = entry
    elif event in ("step", "evaluation", "layers", "resumed", "trained"):
        tags = {"purpose": "compare", **entry}
        course = courses.setdefault(title_of(tags), Course(tags))
        if event == "resumed":
            course.forget_after(int(entry["step"]))
        elif event == "step":
            course.steps[int(entry["step"])] = entry
        elif event == "evaluation":
            course.evaluations[int(entry["step"])] = _evaluation(entry)
        elif event == "layers":
            course.layers[int(entry["step"])] = entry["layers"]
        else:
            course.trained = entry


def _evaluation(entry: Mapping[str, Any]) -> Evaluation:
    metrics = {
        data: {k: _number(v) for k, v in own.items()} for data, own in (entry.get("metrics") or {}).items()
    }
    scores = {name: _number(score) for name, score in entry["scores"].items()}
    retained = {name: _number(value) for name, value in (entry.get("retained") or {}).items()}
    return Evaluation(int(entry["step"]), float(entry["epoch"]), scores, metrics, retained)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
