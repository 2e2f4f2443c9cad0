"""Tables and the picture of scaling.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.latency import Network
from rich.console import Console
from rich.table import Table


def _table(title: str, *heads: str) -> Table:
    table = Table(title=title, title_justify="left", expand=False)
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i == 0 else "right")
    return table


def _by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {own["name"]: own for own in result.get("variants", ())}


def print_real(console: Console, results: Sequence[dict[str, Any]]) -> None:
    """Real processes: AdamSPD beside AdamW and the naive form."""
    table = _table(
        "Real processes (FSDP2 over gloo from 2 on), one step",
        "ranks x tensors", "AdamW ms", "AdamSPD ms", "waiting ms", "calls", "payload B",
        "naive ms", "its calls", "us per tensor",
    )  # fmt: skip
    for result in results:
        own, case = _by_name(result), result["case"]
        if not own:
            continue
        base, spd, naive = own["adamw_fused"], own["adamspd_fused"], own["naive_dtensor"]
        table.add_row(
            f"{case['ranks']} x {case['layers']}",
            f"{base['seconds'] * 1e3:.2f}",
            f"{spd['seconds'] * 1e3:.2f}",
            f"{spd['waiting_for_all_reduce_seconds'] * 1e3:.2f}",
            str(spd["all_reduces"]),
            str(spd["payload_bytes"]),
            f"{naive['seconds'] * 1e3:.1f}",
            str(naive["all_reduces"]),
            f"{(spd['seconds'] - base['seconds']) / case['layers'] * 1e6:.0f}",
        )
    console.print(table)


def print_layouts(console: Console, results: Sequence[dict[str, Any]]) -> None:
    """One rank among many."""
    table = _table(
        "One rank among many (torch's fake process group; seconds of this rank's own work)",
        "model", "engine", "ranks", "M elements here", "layout s", "attach s",
        "its CPU s", "weights MB", "held MB",
        "peak MB", "calls", "payload B", "bind calls",
    )  # fmt: skip
    for result in results:
        case = result["case"]
        head = (case["model"], case["engine"], str(case["world"]))
        if "step" not in result:
            table.add_row(*head, result.get("skipped") or "failed")
            continue
        seconds, memory = result["seconds"], result["memory"]
        table.add_row(
            *head,
            f"{result['local_elements'] / 1e6:.1f}",
            f"{seconds['layout, first']:.3f}",
            f"{seconds['attach in full']:.2f}",
            f"{seconds['attach in full, processor']:.2f}",
            f"{memory['weights'] / 1e6:.0f}",
            f"{memory['held by attach'] / 1e6:.0f}",
            f"{memory['peak of attach'] / 1e6:.0f}",
            str(result["step"]["all_reduces"]),
            str(result["step"]["payload_bytes"]),
            str(sum(result["binding"]["collectives"].values())),
        )
    console.print(table)


def print_latency(
    console: Console, network: Network, payload: int, layers: int, rows: Sequence[dict[str, float]]
) -> None:
    """The arithmetic."""
    title = (
        f"Computed, not measured: {payload} bytes at {network.latency * 1e6:.0f} us per message and "
        f"{network.bandwidth / 1e9:.0f} GB/s; naive: {layers} layers one by one"
    )
    table = _table(title, "ranks", "ring ms", "tree ms", "naive form ms")
    for row in rows:
        values = [f"{row[key] * 1e3:.3f}" for key in ("ring", "tree", "naive")]
        table.add_row(str(row["ranks"]), *values)
    console.print(table)


def draw(path: Path, report: dict[str, Any]) -> None:
    """Three panels: real ranks, layouts, arithmetic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (first, second, third) = plt.subplots(1, 3, figsize=(15, 4.4))
    _draw_real(first, report["real"])
    _draw_layouts(second, [r for r in report["layouts"] if "step" in r])
    for key, label in (
        ("ring", "one all-reduce, ring"),
        ("tree", "one all-reduce, tree"),
        ("naive", "naive"),
    ):
        rows = report["latency"]
        third.plot([r["ranks"] for r in rows], [r[key] * 1e3 for r in rows], marker="o", label=label)
    third.set(xscale="log", yscale="log", xlabel="ranks", ylabel="ms per step (computed)")
    third.set_title("what the network adds, 723 layers" if report["latency"] else "", fontsize=9)
    if report["latency"]:
        third.set_title(f"what the network adds, {report['latency_of']['layers']} layers", fontsize=9)
        third.legend(fontsize=7)
    machine = report["hardware"]
    figure.suptitle(
        f"{machine['cpu']}, {machine['cores']} cores, torch {report['versions']['torch']}, "
        f"commit {str(report['commit'])[:10]}, {report['date'][:10]}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_real(ax: Any, results: Sequence[dict[str, Any]]) -> None:
    colours = {1: "tab:blue", 2: "tab:orange", 4: "tab:green"}
    styles = {"adamw_fused": ":", "adamspd_fused": "-", "naive_dtensor": "--"}
    for ranks in sorted({r["case"]["ranks"] for r in results}):
        for name, style in styles.items():
            points = sorted(
                (r["case"]["layers"], _by_name(r)[name]["seconds"] * 1e3)
                for r in results
                if r["case"]["ranks"] == ranks and name in _by_name(r)
            )
            if points:
                label = f"{name}, {ranks} rank(s)"
                ax.plot(*zip(*points, strict=True), style, marker="o", color=colours[ranks], label=label)
    ax.set(xscale="log", yscale="log", xlabel="tensors", ylabel="ms per step")
    ax.set_title("real processes, the same number of elements", fontsize=9)
    ax.legend(fontsize=6)


def _draw_layouts(ax: Any, results: Sequence[dict[str, Any]]) -> None:
    for model, engine in dict.fromkeys((r["case"]["model"], r["case"]["engine"]) for r in results):
        for key, style in (("layout, first", "-"), ("attach in full", "--")):
            points = sorted(
                (r["case"]["world"], r["seconds"][key])
                for r in results
                if (r["case"]["model"], r["case"]["engine"]) == (model, engine)
            )
            label = f"{key.partition(',')[0]}, {model}, {engine}"
            ax.plot(*zip(*points, strict=True), style, marker="o", markersize=4, label=label)
    ax.set(xscale="log", yscale="log", xlabel="ranks (pretended)", ylabel="seconds on one rank")
    ax.set_title("before the first step", fontsize=9)
    ax.legend(fontsize=6)
