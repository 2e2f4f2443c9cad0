"""The report of a run as one HTML file that needs nothing else: no network, no scripts, pictures inside."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sharded_spd.finetune.report.history import Course, History, read_history
from sharded_spd.finetune.report.plot import draw, draw_layers, draw_rates, draw_training, largest
from sharded_spd.finetune.report.records import ID, Evaluation, TrainingResult
from sharded_spd.finetune.report.summary import Column, compared, differences
from sharded_spd.finetune.report.tracking import flat

MOST_LAYERS = 30
"""Rows of the table of layers; the heat map has all."""

_STYLE = """
:root{--ink:#1f2933;--soft:#5b6875;--line:#e0e5ea;--back:#f6f7f9}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,"DejaVu Sans",sans-serif}
main{max-width:1040px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:25px;margin:0 0 2px;overflow-wrap:anywhere} h2{font-size:18px;margin:0 0 12px}
p{margin:6px 0} .soft{color:var(--soft)}
section{background:#fff;border:1px solid var(--line);border-radius:8px;padding:18px 20px;margin-top:18px}
.wide{overflow-x:auto;margin-top:10px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
td,th{padding:5px 14px 5px 0;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
td{white-space:nowrap} td:first-child,th:first-child{text-align:left} th{font-weight:600;color:var(--soft)}
table.facts td{text-align:left;white-space:normal;overflow-wrap:anywhere}
table.facts td:first-child{color:var(--soft);white-space:nowrap}
tr.strong td{font-weight:600} img{display:block;max-width:100%;margin:0 auto}
.bad{border-color:#d9a441;background:#fff9ec} li{overflow-wrap:anywhere} code{font-size:13px}
"""


def write_report(directory: Path) -> Path:
    """Draw the pictures of a run and write report.html into its directory.

    Raises:
        ConfigError: a directory that is no run.
        OSError: nothing can be written there.
    """
    history = read_history(directory)
    results = history.results()
    columns = compared(results) if results else []
    pictures = _draw_all(history, columns)
    name = history.directory.resolve().name
    body = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="soft">{escape(_subtitle(history))}</p>',
        _warnings(history, results),
        _section("Results", _results(columns, history)),
        *(_section(title, _picture(path, title)) for title, path in pictures),
        *(_section(f"Layers: {c.title}", _layers(c)) for c in history.compared() if c.layers),
        _section("Trainings", _trainings(history)),
        _section("What ran", _facts(_what_ran(history))),
        _section("Configuration", _facts(flat(history.config))),
    ]
    page = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} - sharded_spd</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )
    path = directory / "report.html"
    beside = path.with_suffix(".part")
    beside.write_text(page, encoding="utf-8", errors="replace")
    os.replace(beside, path)
    return path


def metric_of(history: History) -> tuple[str, bool]:
    """The metric that methods are compared by, and whether it is a share in percent."""
    if "metric" in history.run:
        return str(history.run["metric"]), bool(history.run.get("percent"))
    first = next(iter(history.zero_shot.values()), None)
    names = list(first.metrics.get(ID, {})) if first is not None else []
    return (names[0] if names else "score"), False


def _draw_all(history: History, columns: Sequence[Column]) -> list[tuple[str, Path]]:
    directory, pictures = history.directory, []
    if columns:
        metric, percent = metric_of(history)
        path = directory / "id_ood.png"
        draw(columns, path, metric=metric, percent=percent)
        pictures.append(("In and out of distribution", path))
    methods = list(dict.fromkeys(course.method for course in history.compared()))
    losses, norms, rates = (_lines(history, key) for key in ("loss", "grad_norm", "activation_rate"))
    if losses:
        path = directory / "training.png"
        draw_training(losses, norms, path, methods=methods)
        pictures.append(("Training", path))
    if rates:
        path = directory / "activation.png"
        draw_rates(rates, path, methods=methods)
        pictures.append(("Layers pulled per step", path))
    first = {course.method: course for course in reversed(history.compared()) if course.layers}
    most = max((largest(course.layers) for course in first.values()), default=0.0)
    for number, course in enumerate(reversed(first.values()), start=1):  # the first seed of each method
        path = directory / ("layers.png" if number == 1 else f"layers-{number}.png")
        title = f"{course.title}: distance of each layer from its start"
        draw_layers(course.layers, path, title=title, most=most)
        pictures.append((f"Layers over depth and time: {course.title}", path))
    return pictures


def _lines(history: History, key: str) -> list[tuple[str, list[tuple[int, float]]]]:
    """A figure of each step, by training; without those that have none."""
    found = []
    for course in history.compared():
        steps = sorted(course.steps.items())
        points = [(step, float(own[key])) for step, own in steps if own.get(key) is not None]
        if points:
            found.append((course.method, points))
    return found


def _subtitle(history: History) -> str:
    state = "finished"
    if history.end is None:
        state = "broken off or still running"
    elif history.end.get("complete") is False:
        state = "stopped before its end"
    return f"{history.config.get('task', 'fine-tuning')} · {state} · {_duration(history.seconds)}"


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _warnings(history: History, results: Sequence[TrainingResult]) -> str:
    found = list(dict.fromkeys(history.warnings))
    if history.damaged:
        found.append(f"{history.damaged} line(s) of metrics.jsonl could not be read")
    found += [f"{c.title} did not finish" for c in history.compared() if c.trained is None]
    if not found:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in found)
    return f'<section class="bad"><h2>Warnings</h2><ul>{items}</ul></section>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], strong: int = 0) -> str:
    top = "".join(f"<th>{escape(text)}</th>" for text in head)
    lines = []
    for index, row in enumerate(rows):
        cells = "".join(f"<td>{escape(text)}</td>" for text in row)
        lines.append(f'<tr class="strong">{cells}</tr>' if index < strong else f"<tr>{cells}</tr>")
    return f'<div class="wide"><table><tr>{top}</tr>{"".join(lines)}</table></div>'


def _facts(facts: Mapping[str, Any]) -> str:
    if not facts:
        return '<p class="soft">Not written down.</p>'
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in facts.items())
    return f'<div class="wide"><table class="facts">{rows}</table></div>'


def _results(columns: Sequence[Column], history: History) -> str:
    if not columns:
        return '<p class="soft">No evaluation was finished.</p>'
    metric, percent = metric_of(history)
    digits = 1 if percent else 3
    names = [name for name in columns[0].last(columns[0].runs[0]).scores if name != ID]
    kept = list(columns[0].last(columns[0].runs[0]).retained)
    head = ["method", "in distribution", *(["OOD mean", *names] if names else [])]
    head += [f"retained: {name}, accuracy in %" for name in kept]
    rows = []
    for column in columns:
        row = [column.title, column.figure(lambda e: e.id).text(digits)]
        if names:
            row.append(column.figure(lambda e: e.ood).text(digits))
            row += [column.figure(lambda e, n=name: e.scores.get(n, math.nan)).text(digits) for name in names]  # type: ignore[misc]
        row += [column.figure(lambda e, n=name: e.retained.get(n, math.nan)).text() for name in kept]  # type: ignore[misc]
        rows.append(row)
    seeds = max(len(column.runs) for column in columns)
    spread = f"; mean ± standard error over {seeds} seeds" if seeds > 1 else ""
    note = f"{metric}{' in %' if percent else ''}{spread}"
    after = "".join(f"<p>{escape(line)}</p>" for line in differences(columns, digits=digits))
    return f'<p class="soft">{escape(note)}</p>{_table(head, rows)}{after}{_all_metrics(columns)}'


def _all_metrics(columns: Sequence[Column]) -> str:
    """Every metric of every set at the end, where there are several."""
    found = columns[-1].last(columns[-1].runs[0]).metrics
    names = list(dict.fromkeys(name for own in found.values() for name in own))
    if len(names) < 2:
        return ""
    rows = [
        [
            column.title,
            data,
            *(column.figure(lambda e, d=data, n=n: _metric(e, d, n)).text(3) for n in names),  # type: ignore[misc]
        ]
        for column in columns
        for data in found
    ]
    return _table(["method", "set", *names], rows)


def _metric(found: Evaluation, data: str, name: str) -> float:
    return found.metrics.get(data, {}).get(name, math.nan)


def _picture(path: Path, title: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'


def _layers(course: Course) -> str:
    last = course.layers[max(course.layers)]
    moments = list(course.layers.values())
    ruled = any("s" in layer for layer in last.values())

    def row(name: str) -> list[str]:
        own = [moment[name] for moment in moments if name in moment]
        pulled = sum((one.get("s") or 0.0) > 0 for one in own) / len(own)
        relative, away = last[name].get("deviation_rel"), last[name].get("deviation")
        return [
            name,
            "-" if relative is None else f"{100 * relative:.2f} %",
            "-" if away is None else f"{away:.4g}",
            *([f"{100 * pulled:.0f} %"] if ruled else []),
        ]

    names = sorted(last, key=lambda name: -(last[name].get("deviation_rel") or 0.0))[:MOST_LAYERS]
    note = f"The {len(names)} of {len(last)} layers that moved most by step {max(course.layers)}"
    if ruled:
        note += f"; pulled: in how many of the {len(moments)} steps that were written down"
    head = ["layer", "distance / size", "distance", *(["pulled"] if ruled else [])]
    return f'<p class="soft">{escape(note)}</p>{_table(head, map(row, names))}'


def _trainings(history: History) -> str:
    rows = []
    for course in history.compared():
        result = course.result(None)
        rate = "-" if result.activation_rate is None else f"{100 * result.activation_rate:.1f} %"
        moved = "-" if math.isnan(result.deviation) else f"{100 * result.deviation:.2f} %"
        loss = _last_loss(course)
        speed = "-" if math.isnan(result.samples_per_second) else f"{result.samples_per_second:.3g}"
        steps = str(max(course.steps, default=0))
        rows.append([course.title, steps, loss, moved, rate, speed, _duration(result.seconds)])
    if not rows:
        return '<p class="soft">None was begun.</p>'
    head = ["training", "steps", "last loss", "moved", "pulled per step", "examples/s", "time"]
    return _table(head, rows)


def _last_loss(course: Course) -> str:
    if not course.steps:
        return "-"
    loss = course.steps[max(course.steps)].get("loss")
    return "-" if loss is None else f"{loss:.4f}"


def _what_ran(history: History) -> dict[str, Any]:
    run = history.run
    facts = {key: run[key] for key in ("engine", "ranks", "checkpoint") if run.get(key) is not None}
    facts |= run.get("machine") or {}
    facts |= run.get("versions") or {}
    memory = (history.end or {}).get("peak_memory") or {}
    facts |= {f"peak memory of rank 0, {k.removesuffix('_gib')}": f"{v} GiB" for k, v in memory.items()}
    return {"time": _duration(history.seconds), "directory": history.directory.resolve(), **facts}
