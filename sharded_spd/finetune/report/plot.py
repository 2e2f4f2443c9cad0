"""The pictures of a job: scores in and out of distribution, how far layers moved, how often pulled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sharded_spd.finetune.report.records import Evaluation, Figure
from sharded_spd.finetune.report.summary import Column

_COLOURS = ("#d1495b", "#2e86ab", "#3b8c5a", "#8f5fbf", "#e09f3e", "#6b6b6b")


def draw(columns: Sequence[Column], path: Path, *, metric: str, percent: bool) -> None:
    """Draw each method's way from the zero-shot point, and its scores by epoch, with standard errors."""
    pyplot = _pyplot()
    figure, (plane, time) = pyplot.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
    unit = " (%)" if percent else ""
    start = columns[0].last(columns[0].runs[0])
    for column, colour in zip(columns[1:], _COLOURS, strict=False):
        _way(plane, column, colour)
        _by_epoch(time, column, colour)
    plane.plot(start.id, start.ood, "*", color="black", markersize=13, label="zero-shot", zorder=5)
    plane.set_xlabel(f"in-distribution {metric}{unit}")
    plane.set_ylabel(f"out-of-distribution {metric}{unit}")
    plane.set_title("From the pre-trained model to the end of training", fontsize=10)
    time.set_xlabel("epoch")
    time.set_ylabel(f"{metric}{unit}")
    time.set_title("Solid: out of distribution. Dashed: in distribution", fontsize=10)
    for axes in (plane, time):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    plane.legend(frameon=False, loc="best")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_path(points: Sequence[tuple[float, Evaluation]], path: Path, *, metric: str, percent: bool) -> None:
    """Draw the scores of the checkpoints between two others, each with its alpha."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(5.6, 4.4), layout="constrained")
    unit = " (%)" if percent else ""
    axes.plot([e.id for _, e in points], [e.ood for _, e in points], "-o", color=_COLOURS[1], markersize=5)
    for alpha, found in points:
        axes.annotate(
            f"{alpha:g}", (found.id, found.ood), xytext=(5, 5), textcoords="offset points", fontsize=8
        )
    axes.set_xlabel(f"in-distribution {metric}{unit}")
    axes.set_ylabel(f"out-of-distribution {metric}{unit}")
    axes.set_title("alpha: 0 the pre-trained model, 1 the fine-tuned one", fontsize=10)
    axes.margins(0.12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _means(column: Column) -> list[tuple[float, Figure, Figure]]:
    moments: list[tuple[Evaluation, ...]] = list(zip(*(run.history for run in column.runs), strict=False))
    return [(m[0].epoch, Figure.of([e.id for e in m]), Figure.of([e.ood for e in m])) for m in moments]


def _way(axes: Any, column: Column, colour: str) -> None:
    means = _means(column)
    xs, ys = [i.mean for _, i, _ in means], [o.mean for _, _, o in means]
    axes.plot(xs, ys, "-o", color=colour, markersize=3.5, linewidth=1.3, alpha=0.6)
    _, last_id, last_ood = means[-1]
    axes.errorbar(
        last_id.mean,
        last_ood.mean,
        xerr=_bar(last_id),
        yerr=_bar(last_ood),
        fmt="o",
        color=colour,
        markersize=8,
        capsize=3,
        label=column.title,
        zorder=4,
    )


def _by_epoch(axes: Any, column: Column, colour: str) -> None:
    means = _means(column)
    epochs = [epoch for epoch, _, _ in means]
    for pick, style in ((2, "-"), (1, "--")):
        figures: list[Figure] = [m[pick] for m in means]  # type: ignore[misc]
        axes.errorbar(
            epochs,
            [f.mean for f in figures],
            yerr=[_bar(f) or 0.0 for f in figures],
            linestyle=style,
            color=colour,
            marker="o",
            markersize=3,
            linewidth=1.3,
            capsize=2,
        )


def _bar(figure: Figure) -> float | None:
    return figure.error if figure.error == figure.error else None  # NaN: one seed


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plain_text(text: str) -> str:
    """Without the dollar signs that matplotlib would read as mathematics."""
    return text.replace("$", r"\$")


Lines = Sequence[tuple[str, Sequence[tuple[int, float]]]]
"""The points of each training by step, under the name of its method."""


def _lines(axes: Any, lines: Lines, methods: Sequence[str]) -> None:
    """One line per training, in its method's colour; a method has one entry in the legend."""
    named: set[str] = set()
    for method, points in lines:
        if not points:
            continue
        axes.plot(
            [step for step, _ in points],
            [value for _, value in points],
            marker="o" if len(points) == 1 else None,
            linewidth=1.2,
            color=_COLOURS[methods.index(method) % len(_COLOURS)],
            label=None if method in named else plain_text(method),
        )
        named.add(method)
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_rates(lines: Lines, path: Path, *, methods: Sequence[str]) -> None:
    """Draw the share of layers that were pulled, by step; `methods`: all of the run, in their order."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8.5, 3.2), layout="constrained")
    _lines(axes, [(m, [(step, 100 * rate) for step, rate in points]) for m, points in lines], methods)
    axes.set_ylabel("layers pulled (%)")
    axes.set_ylim(-2, 102)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_training(losses: Lines, norms: Lines, path: Path, *, methods: Sequence[str]) -> None:
    """Draw the loss and the norm of the gradients by step."""
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.5, 3.4), layout="constrained")
    _lines(left, losses, methods)
    _lines(right, norms, methods)
    left.set_ylabel("loss")
    right.set_ylabel("norm of the gradients")
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


Layers = Mapping[int, Mapping[str, Mapping[str, float]]]
"""By step, then by layer."""


def largest(moments: Layers) -> float:
    """The largest |w - w0| / |w0| of any layer at any time, in %."""
    every = (_percent(layer) for found in moments.values() for layer in found.values())
    return max((value for value in every if value == value), default=0.0)


def draw_layers(moments: Layers, path: Path, *, title: str, most: float) -> None:
    """Draw |w - w0| / |w0| in % of each layer, the first layer of the model on top, by step.

    `most`: the end of the scale of colours.
    """
    pyplot = _pyplot()
    from matplotlib.colors import PowerNorm

    names = list(dict.fromkeys(name for found in moments.values() for name in found))
    steps = sorted(moments)
    values = [[_percent(moments[step].get(name, {})) for step in steps] for name in names]
    figure, axes = pyplot.subplots(
        figsize=(9, min(14.0, 1.6 + 0.16 * max(8, len(names)))), layout="constrained"
    )
    # By the root: a few layers move far more than the rest.
    colours = pyplot.get_cmap("viridis").with_extremes(bad="#e8ebee")
    scale = PowerNorm(0.5, vmin=0, vmax=most or 1)
    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap=colours, norm=scale)
    every = max(1, -(-len(names) // 80))
    axes.set_yticks(range(0, len(names), every), [plain_text(n) for n in names[::every]], fontsize=6)
    shown = range(0, len(steps), max(1, -(-len(steps) // 10)))
    axes.set_xticks(list(shown), [str(steps[i]) for i in shown])
    axes.set_xlabel("step")
    axes.set_title(plain_text(title), fontsize=10)
    figure.colorbar(image, ax=axes, label="distance from the start (%); grey: began at zero", shrink=0.8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _percent(layer: Mapping[str, float]) -> float:
    found = layer.get("deviation_rel")
    return float("nan") if found is None else 100 * found
