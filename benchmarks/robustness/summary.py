"""The table and the pictures of the benchmark, from the lines of its trainings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.robustness.methods import ADAMW, ALPHAS, LOW, METHODS, WISE, by_name
from benchmarks.robustness.settings import SETTINGS
from sharded_spd.finetune.report.records import plain_json

Lines = Sequence[Mapping[str, Any]]
ORDER = [*(m.name for m in METHODS[:2]), WISE, *(m.name for m in METHODS[2:])]
BY_LAYER = {"SPD", "MAPS", "FTP"}
"""The methods that pull a layer in one step and not in another."""
SIZES = {ADAMW: 12, LOW: 9}
"""So that they are seen below those that came out alike."""
COLOURS = (
    "#d1495b",
    "#f4a6b0",
    "#6b6b6b",
    "#e09f3e",
    "#2e86ab",
    "#3b8c5a",
    "#8f5fbf",
    "#b5651d",
    "#17becf",
    "#c2185b",
)


def summarise(trainings: Mapping[str, Lines], out: Path) -> None:
    """Write summary.json, table.md and the pictures of what is there."""
    found = {name: rows for name, lines in trainings.items() if (rows := _rows(lines))}
    (out / "summary.json").write_text(plain_json(found, indent=1), encoding="utf-8")
    text = "\n".join(_table(name, rows) for name, rows in found.items())
    (out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    if found:
        _scatter(found, out / "id_ood.png")
        for name in found:
            finals = [line for line in trainings[name] if line["key"].endswith("final")]
            _heat(name, finals, out / f"layers-{name}.png")


def _rows(lines: Lines) -> list[dict[str, Any]]:
    """A row of figures per method, mean and standard error over the seeds; the pre-trained model first."""
    finals: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        _, method, candidate, _, kind = line["key"].split(" ")
        if kind == "final":
            finals.setdefault(method, []).append({**line, "candidate": int(candidate)})
    for method, own in finals.items():  # of another candidate: chosen once, and not any more
        finals[method] = [line for line in own if line["candidate"] == own[-1]["candidate"]]
    rows = []
    for method in (m for m in ORDER if m in finals):
        own = finals[method]
        up = own[0]["higher_is_better"]
        ood = [_ood(line["scores"]) for line in own]
        rows.append(
            {
                "method": method,
                "chosen": chosen_text(method, own[0]["candidate"]),
                "last": method != ADAMW and own[0]["candidate"] == 3,
                "metric": own[0]["metric"],
                "seeds": len(own),
                "id": _figure([line["scores"]["test"] for line in own]),
                "ood": _figure([statistics.fmean(values) for values in ood]),
                "worst": _figure([(min if up else max)(values) for values in ood]),
                "retained": _figure([line["retained"] for line in own if "retained" in line]),
                "deviation": _figure([100 * line["deviation"] for line in own]),
                "rate": _figure([100 * line["activation_rate"] for line in own if method in BY_LAYER]),
                "sets": {name: _figure([line["scores"][name] for line in own]) for name in own[0]["scores"]},
            }
        )
    plain = finals.get(ADAMW, [])
    return [_start(rows[0]["metric"], plain), *rows] if plain else rows


def _start(metric: str, lines: Lines) -> dict[str, Any]:
    """The row of the pre-trained model, from the scores before each training: a new head differs by seed."""
    starts = [line["zero_shot"] for line in lines]
    ood = [_ood(scores) for scores in starts]
    worst = [(max if metric == "perplexity" else min)(values) for values in ood]

    def figure(values: Sequence[float]) -> list[float]:
        return _figure(values if len({*values}) > 1 else values[:1])

    return {
        **{"method": "pre-trained", "chosen": "", "last": False, "metric": metric, "seeds": len(lines)},
        "id": figure([scores["test"] for scores in starts]),
        "ood": figure([statistics.fmean(values) for values in ood]),
        "worst": figure(worst),
        "retained": figure([kept for line in lines for kept in line.get("zero_shot_retained", ())]),
        **{key: [math.nan, math.nan] for key in ("deviation", "rate")},
        "sets": {name: figure([scores[name] for scores in starts]) for name in starts[0]},
    }


def _ood(scores: Mapping[str, float]) -> list[float]:
    return [score for name, score in scores.items() if name != "test"]


def chosen_text(method: str, candidate: int) -> str:
    if method == WISE:
        return f"alpha {ALPHAS[candidate]:g}"
    names = {
        "train.lr*": "lr x",
        "spd.weight_decay": "λ",
        "spd.rule_options.k": "k",
        "spd.rule_options.mu": "mu",
    }
    pairs = (setting.split("=") for setting in by_name(method).candidates[candidate])
    return ", ".join(f"{names[name]} {value}" for name, value in pairs)


def _figure(values: Sequence[float]) -> list[float]:
    """Mean and standard error."""
    if not values:
        return [math.nan, math.nan]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return [statistics.fmean(values), error]


def _text(figure: Sequence[float], digits: int) -> str:
    mean, error = figure
    if math.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def _table(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    digits = 1 if rows[0]["metric"] in ("accuracy", "f1") else 3
    seeds = max(row["seeds"] for row in rows)
    kept = any(not math.isnan(row["retained"][0]) for row in rows)
    lines = [
        f"### {SETTINGS[name].title} ({rows[0]['metric']}, {seeds} seeds, mean ± standard error)\n",
        f"| method | chosen | ID | mean OOD | worst OOD |{' retained |' if kept else ''} "
        "distance from the start, % | layers pulled, % |",
        "|---|---|---|---|---|---|---|" + ("---|" if kept else ""),
    ]
    for row in rows:
        cells = [_text(row[key], digits) for key in ("id", "ood", "worst")]
        cells += [_text(row[key], 1) for key in (*(("retained",) if kept else ()), "deviation", "rate")]
        lines.append(f"| {row['method']} | {row['chosen']} | {' | '.join(cells)} |")
    edge = [row["method"] for row in rows if row["last"]]
    if edge:
        lines.append(f"\nTook the last of their four: {', '.join(edge)}.")
    return "\n".join(lines) + "\n"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _scatter(found: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    pyplot = _pyplot()
    figure, planes = pyplot.subplots(
        1, len(found), figsize=(5.2 * len(found), 4.6), layout="constrained", squeeze=False
    )
    colours = dict(zip(ORDER, COLOURS, strict=True))
    for axes, (name, rows) in zip(planes[0], found.items(), strict=True):
        for row in rows:
            if row["method"] == "pre-trained":
                continue
            (x, dx), (y, dy) = row["id"], row["ood"]
            bars = {"xerr": None if math.isnan(dx) else dx, "yerr": None if math.isnan(dy) else dy}
            axes.errorbar(
                x, y, **bars, fmt="o", markersize=SIZES.get(row["method"], 6), capsize=3,
                color=colours[row["method"]], label=row["method"],
            )  # fmt: skip
        metric = rows[0]["metric"]
        axes.set_xlabel(f"in-distribution {metric}")
        axes.set_ylabel(f"mean out-of-distribution {metric}")
        axes.set_title(SETTINGS[name].title, fontsize=11)
        if metric == "perplexity":  # less is better: up and to the right, as with the others
            axes.invert_xaxis()
            axes.invert_yaxis()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = planes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=4 * len(found))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _heat(name: str, finals: Lines, path: Path) -> None:
    """Draw |w - w0| / |w0| of each layer at the end, mean over the seeds, a column per method."""
    pyplot = _pyplot()
    from matplotlib.colors import LogNorm

    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for line in finals:
        by_method.setdefault(line["key"].split(" ")[1], []).append(line["layers"])
    methods = [m for m in ORDER if m in by_method]
    layers = list(by_method[methods[0]][0])

    def cell(layer: str, method: str) -> float:
        pairs = [own[layer] for own in by_method[method]]
        return statistics.fmean(100 * away / size if size else math.nan for away, size in pairs)

    values = [[cell(layer, method) for method in methods] for layer in layers]
    flat = [v for row in values for v in row if v > 0]
    high = max(flat)
    figure, axes = pyplot.subplots(figsize=(7.5, min(14, 1.8 + 0.16 * len(layers))), layout="constrained")
    norm = LogNorm(vmin=max(min(flat), high / 1000), vmax=high, clip=True)
    colours = pyplot.get_cmap("viridis").with_extremes(bad="#e8ebee")
    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap=colours, norm=norm)
    every = max(1, -(-len(layers) // 80))
    axes.set_yticks(range(0, len(layers), every), layers[::every], fontsize=6)
    axes.set_xticks(range(len(methods)), methods, fontsize=8, rotation=30)
    axes.set_title(SETTINGS[name].title, fontsize=10)
    figure.colorbar(image, ax=axes, label="distance from the start (%); grey: began at zero", shrink=0.8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
