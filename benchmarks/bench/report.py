"""Results for people: tables, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.case import Case
from rich.console import Console
from rich.table import Table

NAMES = {
    "adamw_fused": "AdamW, torch fused",
    "copy": "copy of the same bytes",
    "adamw_foreach": "AdamW, torch foreach",
    "adamspd_fused": "AdamSPD fused",
    "attach_fused": "attach on fused AdamW",
    "adamspd_reference": "AdamSPD, plain torch sums",
    "naive_dtensor": "naive DTensor form",
    "published": "published loop",
    "adamspd_graph": "AdamSPD in a CUDA graph",
}


def print_case(console: Console, case: Case, result: dict[str, Any]) -> None:
    """One table, the variants in rows."""
    table = Table(title=case.title, title_justify="left", expand=False)
    table.add_column("")
    for head in (
        "ms",
        "/ AdamW",
        "/ copy",
        "B/param",
        "least",
        "coll.",
        "payload B",
        "exposed",
        "waiting",
        "held",
        "peak",
    ):
        table.add_column(head, justify="right")
    for own in result["variants"]:
        least = own["least_bytes_per_parameter"]
        table.add_row(
            NAMES[own["name"]],
            f"{own['seconds'] * 1e3:.1f}",
            _ratio(own.get("ratio_to_adamw_fused")),
            _ratio(own.get("ratio_to_copy")),
            _ratio(own.get("bytes_per_parameter_at_copy_speed"), 1),
            "" if least is None else f"{least:.1f}",
            str(sum(own["collectives"].values())),
            str(own["payload_bytes"]),
            f"{own['exposed_share']:.1%}",
            f"{own['collective_share']:.1%}",
            _ratio(own["held_bytes_per_parameter"], 1),
            _ratio(own["peak_bytes_per_parameter"], 1),
        )
    console.print(table)
    for line in result["skipped"]:
        console.print(f"  left out: {line}", highlight=False)
    wrong = [
        f"{NAMES[own['name']]}: {own['layers_pulled']} layers pulled, {own['layers_to_be_pulled']} expected"
        for own in result["variants"]
        if own.get("layers_pulled", 0) != own.get("layers_to_be_pulled", 0)
    ]
    for line in wrong:
        console.print(f"  [bold]attention[/bold]: {line}", highlight=False)


def _ratio(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


_AXES = {
    "size": ("parameters", "parameters", True),
    "layers": ("layers", "tensors", True),
    "ranks": ("ranks", "ranks (FSDP2, gloo)", False),
    "pulled": ("pulled", "fraction of layers pulled", False),
}


_FREE = {"series", "variants", "seconds", "min_rounds", "max_rounds", "shape"}
"""What may differ between the cases of one line, besides what the line is about."""


def _comparable(one: dict[str, Any], other: dict[str, Any], series: str) -> bool:
    """Whether two cases differ in nothing but the series' own quantity; sizes are rounded to whole rows."""
    axis = _AXES[series][0] if series in _AXES else ""
    same = one.keys() - _FREE - {axis, "parameters", "layers"}
    if series == "anchor":
        same -= {"anchor_dtype", "anchor_place"}
    near = [key for key in ("parameters", "layers") if key != axis]
    return all(one[key] == other[key] for key in same) and all(
        abs(one[key] - other[key]) <= 0.1 * other[key] for key in near
    )


def _series(results: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The panels: cases that make a line, else each by itself."""
    panels: list[tuple[str, list[dict[str, Any]]]] = []
    default = [r for r in results if r["case"]["series"] == "default"]
    panels += [("bars", [r]) for r in default]
    names = dict.fromkeys(r["case"]["series"] for r in results if r["case"]["series"] != "default")
    for name in names:
        own = [r for r in results if r["case"]["series"] == name]
        line = [r for r in [*default, *own] if _comparable(r["case"], own[0]["case"], name)]
        lined = name in (*_AXES, "anchor") and len(line) > 1
        panels += [(name, line)] if lined else []
        panels += [("bars", [r]) for r in own if not (lined and r in line)]
    return panels


def draw(path: Path, results: Sequence[dict[str, Any]], caption: str) -> None:
    """A panel of lines for cases that differ in one thing, of bars for each other one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = _series(results)
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.6 * columns, 4.2 * rows), squeeze=False)
    flat = list(axes.flat)
    for ax, (name, own) in zip(flat, panels, strict=False):
        if name == "bars":
            _bars(ax, own[0])
        elif name == "anchor":
            _places(ax, own)
        else:
            _lines(ax, name, own)
    for ax in flat[len(panels) :]:
        ax.axis("off")
    figure.suptitle(caption, fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(ax: Any, result: dict[str, Any]) -> None:
    variants = [v for v in result["variants"] if v.get("ratio_to_adamw_fused") is not None][::-1]
    values = [v["ratio_to_adamw_fused"] for v in variants]
    colours = ["tab:blue" if "spd" in v["name"] or "attach" in v["name"] else "tab:grey" for v in variants]
    ax.barh([NAMES[v["name"]] for v in variants], values, color=colours)
    for i, value in enumerate(values):
        ax.text(value, i, f" {value:.2f}", va="center", fontsize=8)
    ax.axvline(1.0, color="black", linewidth=0.8)
    ax.set_xlim(0, max(values) * 1.15)
    ax.set_xlabel("time of a step / torch's fused AdamW")
    case = result["case"]
    size = f"{case['parameters'] / 1e6:.0f} M {case['dtype']}"
    ax.set_title(f"{size}, {case['layers']} tensors, {case['ranks']} rank(s)", fontsize=9)
    ax.tick_params(axis="y", labelsize=8)


def _lines(ax: Any, name: str, results: Sequence[dict[str, Any]]) -> None:
    key, label, log = _AXES[name]
    results = sorted(results, key=lambda r: r["case"][key])
    for variant, text in NAMES.items():
        points = [
            (r["case"][key], v["ratio_to_adamw_fused"])
            for r in results
            for v in r["variants"]
            if v["name"] == variant and v.get("ratio_to_adamw_fused") is not None
        ]
        if len(points) > 1 and variant != "adamw_fused":
            ax.plot(*zip(*points, strict=True), marker="o", markersize=3, label=text)
    ax.axhline(1.0, color="black", linewidth=0.8)
    ax.set_yscale("log")
    if log:
        ax.set_xscale("log")
    else:
        ax.set_xticks(sorted({r["case"][key] for r in results}))
    ax.set_xlabel(label)
    ax.set_ylabel("time / fused AdamW")
    ax.legend(fontsize=6)


def _places(ax: Any, results: Sequence[dict[str, Any]]) -> None:
    labels = [f"{r['case']['anchor_dtype']}\n{r['case']['anchor_place']}" for r in results]
    for variant in ("adamspd_fused", "attach_fused"):
        points = [
            (label, v["ratio_to_adamw_fused"])
            for label, r in zip(labels, results, strict=True)
            for v in r["variants"]
            if v["name"] == variant
        ]
        ax.plot(*zip(*points, strict=True), marker="o", linestyle="none", label=NAMES[variant])
    ax.axhline(1.0, color="black", linewidth=0.8)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("anchor: dtype and place")
    ax.set_ylabel("time / fused AdamW")
    ax.legend(fontsize=7)
