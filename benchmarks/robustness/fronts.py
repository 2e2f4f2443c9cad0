"""Which rule is beaten by which, in and out of distribution at once, from trainings on the same seeds."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.robustness.methods import ADAMW
from benchmarks.robustness.settings import SETTINGS
from benchmarks.robustness.summary import Lines, chosen_text

_NOTHING = 1e-9
"""Scores are printed to a tenth or a thousandth; below this is rounding."""
Point = tuple[float, float]
"""In distribution and out of it, both so that more is better."""


def mean_ood(line: Mapping[str, Any]) -> float:
    """The mean over the sets but the test set."""
    return statistics.fmean(score for name, score in line["scores"].items() if name != "test")


def difference(better: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the paired difference."""
    pairs = [a - b for a, b in zip(better, other, strict=True)]
    mean = statistics.fmean(pairs)
    return 0.0 if abs(mean) < _NOTHING else mean, statistics.stdev(pairs) / math.sqrt(len(pairs))


def beats(one: Sequence[Point], other: Sequence[Point]) -> bool:
    """Whether `one` is not worse on either side, and better by two standard errors on one of them."""
    sides = [difference([p[i] for p in one], [p[i] for p in other]) for i in (0, 1)]
    return all(mean >= 0 for mean, _ in sides) and any(mean > 2 * error for mean, error in sides)


def point(line: Mapping[str, Any]) -> Point:
    """Where a training came out."""
    sign = 1 if line["higher_is_better"] else -1
    return sign * line["scores"]["test"], sign * mean_ood(line)


def above(one: Point, others: Sequence[Point]) -> float:
    """How far `one` is above the line through the best of `others`, out of distribution, as a share of it."""
    best = sorted(p for p in {*others} if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in others))
    line = best[0][1] if one[0] <= best[0][0] else best[-1][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(best):
        if x0 < one[0] <= x1:
            line = y0 + (y1 - y0) * (one[0] - x0) / (x1 - x0)
    return (one[1] - line) / abs(line)


def points(lines: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, list[Point]]:
    """The points of each method that has all of these seeds, by its name and strength."""
    found: dict[str, dict[int, Point]] = {}
    for line in lines:
        _, method, candidate, seed, kind = line["key"].split(" ")
        if kind == "final" and int(seed) in seeds:
            name = f"{method} ({chosen_text(method, int(candidate))})"
            found.setdefault(name, {})[int(seed)] = point(line)
    whole = {name: own for name, own in found.items() if own.keys() == {*seeds}}
    return {name: [own[seed] for seed in seeds] for name, own in whole.items()}


def write_fronts(trainings: Mapping[str, Lines], seeds: Sequence[int], out: Path) -> None:
    """Write OUT/search.md: for each setting all rules against AdamW, and by which ones they are beaten."""
    text, front = [], []
    for name, lines in trainings.items():
        found = points(lines, seeds)
        plain = next(own for method, own in found.items() if method.startswith(f"{ADAMW} "))
        text += [
            f"### {SETTINGS[name].title}: differences from AdamW ({len(seeds)} seeds, ± standard error)\n",
            "| rule | ID | mean OOD | beaten by |",
            "|---|---|---|---|",
        ]
        free = set()
        for method, own in found.items():
            worse = [other for other, its in found.items() if other != method and beats(its, own)]
            if not worse:
                free.add(method)
            cells = []
            for side in (0, 1):
                mean, error = difference([p[side] for p in own], [p[side] for p in plain])
                cells.append("0" if own is plain else f"{mean:+.3g} ± {error:.2g}")
            text.append(f"| {method} | {' | '.join(cells)} | {', '.join(worse) or '-'} |")
        text.append("")
        front.append(free)
    everywhere = sorted(set.intersection(*front)) if front else []
    text.append(f"Beaten in no setting, at one strength: {', '.join(everywhere) or 'none'}.\n")
    (out / "search.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))
