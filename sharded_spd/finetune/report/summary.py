"""The end of a job: one table on the terminal and the results as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sharded_spd.finetune.report.records import ID, Evaluation, Figure, TrainingResult, plain_json


@dataclass(frozen=True)
class Column:
    """One method over all seeds; the zero-shot column shows the same trainings before their first step."""

    title: str
    runs: tuple[TrainingResult, ...]
    zero_shot: bool = False

    def last(self, run: TrainingResult) -> Evaluation:
        """The evaluation of a run that this column shows."""
        return run.history[0 if self.zero_shot else -1]

    def figure(self, value: Callable[[Evaluation], float]) -> Figure:
        """Mean and standard error over the seeds."""
        values = [value(self.last(run)) for run in self.runs]
        # A checkpoint's own score is one number however many seeds follow, unless a new head depends on them.
        return Figure.of(values if len(set(values)) > 1 or not self.zero_shot else values[:1])


def compared(results: Sequence[TrainingResult]) -> list[Column]:
    """The columns of a report: zero-shot, then each method in the order in which it was trained."""
    by_title: dict[str, list[TrainingResult]] = {}
    for result in results:
        title = result.method if result.weight_decay is None else f"{result.method} λ={result.weight_decay:g}"
        by_title.setdefault(title, []).append(result)
    columns = [Column(title, tuple(runs)) for title, runs in by_title.items()]
    return [Column("zero-shot", columns[0].runs, zero_shot=True), *columns]


def print_summary(console: Console, columns: Sequence[Column], *, metric: str, percent: bool) -> None:
    """Print the table, and the paired difference to the first method where several were compared."""
    seeds = len(columns[1].runs)
    spread = f", mean ± standard error over {seeds} seeds" if seeds > 1 else ""
    digits = 1 if percent else 3
    table = Table(title=f"{metric}{' in %' if percent else ''}{spread}", title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column.title, justify="right")
    names = [name for name in columns[0].last(columns[0].runs[0]).scores if name != ID]
    table.add_row(
        "in distribution (ID)", *(c.figure(lambda e: e.id).text(digits) for c in columns), style="bold"
    )
    if names:
        ood = (c.figure(lambda e: e.ood).text(digits) for c in columns)
        table.add_row("out of distribution (OOD)", *ood, style="bold", end_section=len(names) < 2)
    for index, name in enumerate(names):
        cells = (c.figure(lambda e, name=name: e.scores[name]).text(digits) for c in columns)  # type: ignore[misc]
        table.add_row(f"  {name}", *cells, end_section=index == len(names) - 1)
    for name in _retained(columns):
        cells = (c.figure(lambda e, name=name: e.retained.get(name, math.nan)).text() for c in columns)  # type: ignore[misc]
        table.add_row(f"retained: {name}, accuracy in %", *cells, style="bold", end_section=True)
    table.add_row(
        "distance from the start", *(_over_runs(c, lambda r: 100 * r.deviation, "%") for c in columns)
    )
    table.add_row("layers pulled per step", *(_over_runs(c, _rate, "%") for c in columns))
    table.add_row(
        "examples per second", *(_over_runs(c, lambda r: r.samples_per_second, "", ".3g") for c in columns)
    )
    console.print(table)
    for line in differences(columns, digits=digits):
        console.print(line)


def differences(columns: Sequence[Column], *, digits: int = 1) -> list[str]:
    """How each method differs from the first one, paired by seed."""
    base = columns[1]
    lines = []
    for column in columns[2:]:
        pairs = list(zip(column.runs, base.runs, strict=False))
        parts = []
        for name, value in (("ID", _id), ("OOD", _ood)):
            figure = Figure.of([value(a.history[-1]) - value(b.history[-1]) for a, b in pairs])
            parts.append(f"{name} {_signed(figure, digits)}")
        for name in _retained(columns):
            away = [a.history[-1].retained[name] - b.history[-1].retained[name] for a, b in pairs]
            parts.append(f"retained: {name} {_signed(Figure.of(away), 1)}")
        lines.append(f"{column.title} against {base.title}, seed by seed: {', '.join(parts)}")
    return lines


def _retained(columns: Sequence[Column]) -> list[str]:
    return list(columns[0].last(columns[0].runs[0]).retained)


def _id(found: Evaluation) -> float:
    return found.id


def _ood(found: Evaluation) -> float:
    return found.ood


def _rate(run: TrainingResult) -> float:
    return math.nan if run.activation_rate is None else 100 * run.activation_rate


def _signed(figure: Figure, digits: int) -> str:
    text = figure.text(digits)
    return text if figure.mean < 0 or math.isnan(figure.mean) else f"+{text}"


def _over_runs(column: Column, value: Callable[[TrainingResult], float], unit: str, form: str = ".1f") -> str:
    if column.zero_shot:
        return "-"
    mean = Figure.of([value(run) for run in column.runs]).mean
    return "-" if math.isnan(mean) else f"{mean:{form}}{unit and ' ' + unit}"


def write_results(
    path: Path, results: Sequence[TrainingResult], columns: Sequence[Column], *, seconds: float
) -> None:
    """Write every training and the means over seeds as JSON."""
    summary: dict[str, dict[str, Any]] = {
        c.title: {name: asdict(c.figure(value)) for name, value in (("id", _id), ("ood", _ood))}
        for c in columns
    }
    for column in columns if _retained(columns) else ():
        summary[column.title]["retained"] = {
            name: asdict(column.figure(lambda e, name=name: e.retained[name]))  # type: ignore[misc]
            for name in _retained(columns)
        }
    content = {"seconds": seconds, "summary": summary, "trainings": [asdict(result) for result in results]}
    path.write_text(plain_json(content, indent=1), encoding="utf-8")
