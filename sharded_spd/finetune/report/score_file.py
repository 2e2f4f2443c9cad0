"""scores.json and id_ood.png of checkpoints between two others, which later runs of the same go on with."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sharded_spd.errors import ConfigError
from sharded_spd.finetune.report.plot import draw_path
from sharded_spd.finetune.report.records import Evaluation, plain_json


@dataclass(frozen=True)
class Scored:
    """A checkpoint between two others, and its scores on each set."""

    alpha: float
    scores: Evaluation


class ScoreFile:
    """The scores in `output` of what `of` describes: the two checkpoints, and the job that scores them.

    Raises:
        ConfigError: there are scores of something else, or a scores.json that cannot be read.
    """

    def __init__(self, output: Path, *, of: Mapping[str, Any], metric: str, percent: bool) -> None:
        self._folder, self._path = output, output / "scores.json"
        self._of: dict[str, Any] = json.loads(plain_json(of))
        self._metric, self._percent = metric, percent
        self._rows: dict[float, Scored] = {}
        self._read()

    @property
    def rows(self) -> list[Scored]:
        """All scores there, by alpha."""
        return [self._rows[alpha] for alpha in sorted(self._rows)]

    def add(self, found: Scored) -> None:
        """Put an alpha's scores in place of its former ones; write both files, each whole or not at all."""
        self._read()  # what another process has added meanwhile
        self._rows[found.alpha] = found
        rows = [{"alpha": row.alpha, **asdict(row.scores)} for row in self.rows]
        content = {"metric": self._metric, "of": self._of, "scores": rows}
        self._folder.mkdir(parents=True, exist_ok=True)
        beside = self._folder / f".scores.{os.getpid()}.json"
        picture = self._folder / f".id_ood.{os.getpid()}.png"
        try:
            beside.write_text(plain_json(content, indent=1), encoding="utf-8")
            os.replace(beside, self._path)
            points = [(row.alpha, row.scores) for row in self.rows]
            draw_path(points, picture, metric=self._metric, percent=self._percent)
            os.replace(picture, self._folder / "id_ood.png")
        finally:
            beside.unlink(missing_ok=True)
            picture.unlink(missing_ok=True)

    def _read(self) -> None:
        way_out = "name another --output, or remove it first"
        if not self._path.exists():
            return
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            theirs: Mapping[str, Any] = found.get("of", {})
            rows = [_row(row) for row in found["scores"]]
        except OSError as error:
            raise ConfigError(f"{self._path}: cannot be read: {error.strerror}; {way_out}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{self._path}: is not what this command writes; {way_out}") from None
        differing = _differing(self._of, theirs)
        if differing:
            raise ConfigError(
                f"{self._path}: has scores of something else: {', '.join(differing)} differ(s); {way_out}"
            )
        self._rows.update({row.alpha: row for row in rows})


def _row(row: Mapping[str, Any]) -> Scored:
    """One entry of the file, in which null is NaN."""
    fields = {key: _numbers(value) for key, value in row.items() if key != "alpha"}
    return Scored(float(row["alpha"]), Evaluation(**fields))


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    return math.nan if value is None else value


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted names of the entries that are not the same; all of `ours` where there are none."""
    found: list[str] = []
    for key in dict.fromkeys((*ours, *theirs)):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differing(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}")
    return found
