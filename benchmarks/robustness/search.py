"""Is one rule, at one strength, worth it in every setting? Tries those of `variants.py`.

    python -m benchmarks.robustness                     # first: learning rates, and what to compare with
    python -m benchmarks.robustness.search              # goes on where it stopped

1. Every variant at each of its four strengths in the settings `SCREEN`, at AdamW's learning rate, on the
   seeds that the methods were tuned on. The `KEPT` ones whose default strength gains most
   out of distribution go on.
2. Those in the other settings. A variant's default strength is one for all settings: the strongest that no
   setting's in-distribution validation set can tell from the best one, or from AdamW.
3. At that strength on the table's five seeds, which played no part in it. OUT/search/search.md: `fronts.py`.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a training per core

from benchmarks.robustness.__main__ import RESULTS, SEEDS, TUNE_SEEDS
from benchmarks.robustness.choose import Tuned, as_good, choose
from benchmarks.robustness.fronts import mean_ood, write_fronts
from benchmarks.robustness.methods import ADAMW, VARIANTS
from benchmarks.robustness.runs import Book, Runs
from benchmarks.robustness.settings import SETTINGS
from benchmarks.robustness.training import PRETRAIN_STEPS, Task

SCREEN = ("digits", "classes")
KEPT = 5
STRENGTHS = range(4)
NAMES = [variant.name for variant in VARIANTS]


class Search:
    """One setting's share of it. `main`: the book of the benchmark itself."""

    def __init__(self, name: str, main: Book, runs: Runs) -> None:
        self.name, self._runs = name, runs
        tried = [[main.done.get(Task(name, ADAMW, c, s, True).key) for s in TUNE_SEEDS] for c in STRENGTHS]
        self._adamw: list[list[dict[str, Any]]] = [[line for line in lines if line] for lines in tried]
        if not all(len(lines) == len(TUNE_SEEDS) for lines in self._adamw):
            raise SystemExit(f"run python -m benchmarks.robustness --setting {name} first")
        first = self._adamw[0][0]
        self.kind = Tuned(first["higher_is_better"], first["examples"], SETTINGS[name].slack)
        validation = {c: [line["validation"] for line in lines] for c, lines in enumerate(self._adamw)}
        self._base = choose(validation, replace(self.kind, slack=0.0))

    def run(self, tasks: Sequence[tuple[str, int]], seeds: Sequence[int]) -> None:
        """Train these variants, at these strengths, on these seeds."""
        self._runs.prepare(PRETRAIN_STEPS)
        self._runs.do([Task(self.name, v, c, s, False, self._base) for v, c in tasks for s in seeds])

    def good(self, variant: str) -> set[int]:
        """The strengths that validation cannot tell from the best one, or from AdamW."""
        found = {c: [line["validation"] for line in self._lines(variant, c)] for c in STRENGTHS}
        plain = [line["validation"] for line in self._adamw[self._base]]
        return as_good({**found, -1: plain}, self.kind)

    def gain(self, variant: str, strength: int) -> float:
        """How much better than AdamW out of distribution, as a share of it."""
        plain = statistics.fmean(mean_ood(line) for line in self._adamw[self._base])
        own = statistics.fmean(mean_ood(line) for line in self._lines(variant, strength))
        return (own - plain) / plain * (1 if self.kind.higher_is_better else -1)

    def _lines(self, variant: str, strength: int) -> list[dict[str, Any]]:
        keys = [Task(self.name, variant, strength, s, False).key for s in TUNE_SEEDS]
        return [self._runs.book.done[key] for key in keys]


def defaults(searches: Sequence[Search], names: Sequence[str]) -> dict[str, int]:
    """The strength of each variant that is as good as any in all these settings, if there is one."""
    common = {name: set.intersection(*(s.good(name) for s in searches)) - {-1} for name in names}
    return {name: max(found) for name, found in common.items() if found}


def main() -> None:
    """Search, confirm, and write down what came out."""
    given = _arguments()
    out: Path = given.out / "search"
    out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        searches = [
            Search(
                name,
                Book(given.out / f"{name}.jsonl"),
                Runs(SETTINGS[name], Book(out / f"{name}.jsonl"), given.work / name, pool),
            )
            for name in SETTINGS
        ]
        screen = [s for s in searches if s.name in SCREEN]
        for search in screen:
            search.run([(v, c) for v in NAMES for c in STRENGTHS], TUNE_SEEDS)
        gains = {
            v: statistics.fmean(s.gain(v, c) for s in screen) for v, c in defaults(screen, NAMES).items()
        }
        kept = sorted(gains, key=lambda name: -gains[name])[:KEPT]
        print("kept:", ", ".join(f"{name} ({100 * gains[name]:+.1f} %)" for name in kept), flush=True)
        for search in searches:
            search.run([(v, c) for v in kept for c in STRENGTHS], TUNE_SEEDS)
        found = defaults(searches, kept)
        print("default strengths:", found, flush=True)
        for search in searches:
            search.run(list(found.items()), SEEDS)
    books = {name: (Book(given.out / f"{name}.jsonl"), Book(out / f"{name}.jsonl")) for name in SETTINGS}
    write_fronts(
        {name: [*main.done.values(), *own.done.values()] for name, (main, own) in books.items()}, SEEDS, out
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.robustness.search", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("runs/robustness"), help="scratch files")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1), help="trainings at a time")
    return parser.parse_args()


if __name__ == "__main__":
    main()
