"""What a step with the projection costs, beside AdamW, beside a copy of the bytes, and beside its peers.

    python benchmarks/step_cost.py                 # under a minute: the default case, many layers, 2 ranks
    python benchmarks/step_cost.py --full          # sizes, layers, ranks, anchors, fractions pulled
    python benchmarks/step_cost.py --parameters 3e8 --layers 500 --ranks 2 --dtype bfloat16

All variants of a case run in one process (per rank) and take turns, one step each, so that noise hits all
alike; medians. How layers come to be pulled: benchmarks/bench/gradients.py. How to read it:
benchmarks/README.md. Writes step_cost.json and step_cost.png to --out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.case import BASELINES, VARIANTS, Case
from bench.machine import describe
from bench.ranks import launch
from bench.report import draw, print_case
from bench.shapes import make_blocks, size_of
from rich.console import Console

RESULTS = Path(__file__).parent / "results"
_MANY = ("adamw_fused", "copy", "adamw_foreach", "adamspd_fused", "attach_fused")


def quick(base: Case) -> list[Case]:
    """The default case, many small layers, two ranks."""
    return [
        replace(base, seconds=6.0),
        replace(
            base, series="layers", shape="layered", parameters=5_000_000, layers=2000,
            seconds=2.0, variants=tuple(v for v in VARIANTS if v != "adamspd_reference"),
        ),
        replace(base, series="ranks", ranks=2, threads=1, seconds=3.0,
                variants=(*_MANY, "naive_dtensor")),
    ]  # fmt: skip


def tiny(base: Case) -> list[Case]:
    """A few seconds, for tests: one process and two ranks."""
    own = replace(
        base,
        shape="layered",
        parameters=20_000,
        layers=10,
        threads=1,
        seconds=0.2,
        min_rounds=3,
        max_rounds=5,
    )
    return [own, replace(own, series="ranks", ranks=2)]


def full(base: Case) -> list[Case]:
    """Everything, one thing varied at a time."""
    cases = [base]
    cases += [
        replace(base, series="size", shape="layered", parameters=size, variants=_variants(size))
        for size in (1_000_000, 10_000_000, 100_000_000, 300_000_000)
    ]
    cases.append(
        replace(
            base, series="size", shape="layered", parameters=1_000_000_000, dtype="bfloat16",
            anchor_dtype="bfloat16", variants=(*BASELINES, "adamspd_fused", "attach_fused"), max_rounds=15,
        )
    )  # fmt: skip
    cases += [
        replace(base, series="layers", shape="layered", layers=layers) for layers in (10, 300, 1000, 5000)
    ]
    cases += [replace(base, series="ranks", ranks=ranks, threads=1) for ranks in (1, 2, 4)]
    cases += [replace(base, series="pulled", pulled=pulled) for pulled in (0.0, 1.0)]
    spd = (*BASELINES, "adamspd_fused", "attach_fused")
    for dtype in ("float32", "bfloat16"):
        for place in ("weights", "cpu", "disk"):
            if (dtype, place) == ("float32", "weights"):
                continue
            if place == "cpu" and base.device == "cpu":
                continue  # on a CPU that is with the weights
            cases.append(replace(base, series="anchor", anchor_dtype=dtype, anchor_place=place, variants=spd))
    half = replace(base, series="dtype", dtype="bfloat16", anchor_dtype="bfloat16")
    return [*cases, half]


def _variants(size: int) -> tuple[str, ...]:
    return VARIANTS if size <= 100_000_000 else (*_MANY, "adamspd_reference")


def _single(given: argparse.Namespace, base: Case) -> Case | None:
    """The case that the options ask for; None where they ask for none."""
    keys = ("ranks", "threads", "dtype", "anchor_dtype", "anchor_place", "pulled", "seconds")
    own = {key: getattr(given, key) for key in keys if getattr(given, key) is not None}
    if given.dtype is not None:
        own.setdefault("anchor_dtype", given.dtype)
    if given.variants is not None:
        own["variants"] = tuple(v for v in VARIANTS if v in {*BASELINES, *given.variants})
    if given.parameters is not None or given.layers is not None:
        own |= {
            "shape": "layered",
            "parameters": int(given.parameters or base.parameters),
            "layers": given.layers or base.layers,
        }
    return replace(base, **own) if own else None


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    preset = parser.add_mutually_exclusive_group()
    for name, text in (("quick", "under a minute; by default"), ("full", "everything"), ("tiny", "seconds")):
        preset.add_argument(f"--{name}", dest="preset", action="store_const", const=name, help=text)
    parser.add_argument("--parameters", type=float)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--threads", type=int, help="per rank")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--anchor-dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--anchor-place", choices=["weights", "cpu", "disk"])
    parser.add_argument("--pulled", type=float, help="fraction of layers")
    parser.add_argument("--seconds", type=float, help="of measuring")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, help="besides the baselines")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> int:
    """Measure, print, write."""
    given = parse()
    base = Case(device=given.device)
    single = _single(given, base)
    if single is not None and given.preset is not None:
        print(f"got --{given.preset} and options of a single case; wanted one of the two", file=sys.stderr)
        return 2
    preset = {"quick": quick, "full": full, "tiny": tiny}[given.preset or "quick"]
    cases = preset(base) if single is None else [single]
    console = Console(width=None if sys.stdout.isatty() else 150)
    report: dict[str, Any] = {**describe(given.device), "results": []}
    began = time.monotonic()
    for asked in cases:
        parameters, layers = size_of(make_blocks(asked.shape, asked.parameters, asked.layers))
        case = replace(asked, parameters=parameters, layers=layers)
        try:
            result = launch("bench.worker:run_case", case.ranks, (case,))
        except RuntimeError as error:
            console.print(f"{case.title}: [bold]failed[/bold]\n{error}", highlight=False)
            report["results"].append(
                {"case": asdict(case), "variants": [], "skipped": [], "error": str(error)}
            )
            continue
        report["results"].append({"case": asdict(case), **result})
        print_case(console, case, result)
    report["seconds"] = time.monotonic() - began
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "step_cost.json").write_text(json.dumps(report, indent=1) + "\n")
    done = [r for r in report["results"] if r["variants"]]
    if done:
        machine = report["hardware"]
        caption = (
            f"{machine['cpu']}, {machine['cores']} cores, torch {report['versions']['torch']}, "
            f"commit {str(report['commit'])[:10]}, {report['date'][:10]}"
        )
        draw(given.out / "step_cost.png", done, caption)
    console.print(
        f"{report['seconds']:.0f} s; written to {given.out}/step_cost.json and .png", highlight=False
    )
    return int(len(done) < len(cases))


if __name__ == "__main__":
    sys.exit(main())
