"""How the projection's cost grows with layers and ranks.

    python benchmarks/scaling.py           # under a minute: real ranks 1 and 2, 70 B parameters on 1,024
    python benchmarks/scaling.py --full    # real ranks to 4, to 5,000 tensors; HSDP, 2 to 1,024 pretended

Three parts. Real processes (gloo): a step's time and what it waits for. One rank among many, with torch's
fake process group: time and memory of the layout and of `attach`, and what a step sends. Arithmetic: how long
that takes on a network with stated constants. Writes scaling.json and scaling.png to --out; ends with code 1
where the layout of 70 B parameters takes longer than 2 s.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.case import Case, LayoutCase
from bench.latency import Network
from bench.machine import describe
from bench.ranks import launch
from bench.scaling_report import draw, print_latency, print_layouts, print_real
from bench.shapes import make_blocks, size_of
from rich.console import Console

RESULTS = Path(__file__).parent / "results"
LIMIT = 2.0
NAIVE = 3
"""All-reduces per layer of the naive form."""


def real_cases(preset: str) -> list[Case]:
    """A model of few and of many tensors on real ranks."""
    base = Case(
        shape="layered", parameters=4_000_000, layers=100, threads=1, seconds=2.0,
        min_rounds=3, max_rounds=30,
        variants=("adamw_fused", "adamspd_fused", "naive_dtensor"),
    )  # fmt: skip
    if preset == "tiny":
        tiny = replace(base, parameters=20_000, layers=10, seconds=0.2, min_rounds=3, max_rounds=5)
        return [replace(tiny, ranks=ranks) for ranks in (1, 2)]
    ranks, layers = ((1, 2), (50, 300)) if preset == "quick" else ((1, 2, 4), (10, 100, 1000, 5000))
    return [replace(base, ranks=r, layers=n) for n in layers for r in ranks]


def layout_cases(preset: str) -> list[LayoutCase]:
    """One rank among many."""
    if preset == "tiny":
        return [
            LayoutCase(model="tiny", engine=e, world=64) for e in ("fsdp2", "hsdp", "fsdp2+tp")
        ]  # fmt: skip
    large = [LayoutCase(engine="fsdp2"), LayoutCase(engine="fsdp2+tp")]
    if preset == "quick":
        return [*(LayoutCase(model="thin", world=world) for world in (2, 1024)), *large]
    thin = [
        LayoutCase(model="thin", engine=engine, world=world)
        for engine in ("fsdp2", "hsdp", "fsdp2+tp")
        for world in (16, 64, 256, 1024)
    ]
    return [
        LayoutCase(model="thin", world=2),
        *thin,
        *large,
        LayoutCase(engine="hsdp"),
        LayoutCase(world=256),
    ]


def latencies(network: Network, payload: int, layers: int) -> list[dict[str, float]]:
    """Of one step's all-reduce, and of the naive form's, on more and more ranks."""
    return [
        {
            "ranks": ranks,
            "ring": network.ring(payload, ranks),
            "tree": network.tree(payload, ranks),
            "naive": NAIVE * layers * network.best(4, ranks),
        }
        for ranks in (2, 8, 32, 128, 512, 1024)
    ]


def _measure(console: Console, function: str, cases: Sequence[Any]) -> tuple[list[dict[str, Any]], bool]:
    """Results of all cases, and whether one failed."""
    results, failed = [], False
    for case in cases:
        world = case.ranks if isinstance(case, Case) else 1
        try:
            results.append({"case": asdict(case), **launch(function, world, (case,))})
        except RuntimeError as error:
            console.print(f"{case}: [bold]failed[/bold]\n{error}", highlight=False)
            results.append({"case": asdict(case), "error": str(error)})
            failed = True
    return results, failed


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    preset = parser.add_mutually_exclusive_group()
    for name, text in (("quick", "under a minute; by default"), ("full", "everything"), ("tiny", "seconds")):
        preset.add_argument(f"--{name}", dest="preset", action="store_const", const=name, help=text)
    parser.add_argument("--latency", type=float, default=Network().latency, help="seconds per message")
    parser.add_argument("--bandwidth", type=float, default=Network().bandwidth, help="bytes per second")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    chosen, network = given.preset or "quick", Network(given.latency, given.bandwidth)
    console = Console(width=None if sys.stdout.isatty() else 150)
    report, began = describe("cpu"), time.monotonic()
    cases = []
    for asked in real_cases(chosen):
        parameters, layers = size_of(make_blocks(asked.shape, asked.parameters, asked.layers))
        cases.append(replace(asked, parameters=parameters, layers=layers))
    report["real"], failed = _measure(console, "bench.worker:run_case", cases)
    print_real(console, report["real"])
    report["layouts"], also = _measure(console, "bench.layouts:run_layout", layout_cases(chosen))
    print_layouts(console, report["layouts"])
    done = [r for r in report["layouts"] if "step" in r]
    report["network"] = asdict(network)
    report["latency"] = []
    if done:
        largest = max(done, key=lambda r: (r["case"]["world"], r["elements"], -len(r["scopes"])))
        payload, layers = largest["step"]["payload_bytes"], largest["layers"]
        report["latency"] = latencies(network, payload, layers)
        report["latency_of"] = {"payload_bytes": payload, "layers": layers}
        print_latency(console, network, payload, layers, report["latency"])
    report["seconds"] = time.monotonic() - began
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "scaling.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(given.out / "scaling.png", report)
    slow = [r for r in done if r["seconds"]["layout, first"] > LIMIT]
    for r in slow:
        seconds, case = r["seconds"]["layout, first"], r["case"]
        console.print(
            f"the layout took {seconds:.2f} s, wanted {LIMIT:.0f} s at most: {case}", highlight=False
        )
    console.print(f"{report['seconds']:.0f} s; written to {given.out}/scaling.json and .png", highlight=False)
    return int(failed or also or bool(slow))


if __name__ == "__main__":
    sys.exit(main())
