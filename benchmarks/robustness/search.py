"""Is one rule, at one strength, worth it in every setting? Tries `methods.VARIANTS` and rules of the package.

    python -m benchmarks.robustness                     # first: learning rates, and what to compare with
    python -m benchmarks.robustness.search              # goes on where it stopped

1. Every variant at each of its four strengths in the settings `SCREEN`, at AdamW's learning rate, on the
   seeds that the methods were tuned on. The five go on whose default strength is furthest
   above the curve of AdamW's learning rates.
2. Those in the other settings. A variant's default strength is one for all settings: the strongest that no
   setting's in-distribution validation set can tell from the best one, or from AdamW.
3. At that strength on the table's five seeds, which played no part in it. OUT/search/search.md: `fronts.py`.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a training per core

from benchmarks.robustness.__main__ import RESULTS, SEEDS, TUNE_SEEDS
from benchmarks.robustness.choose import Tuned, as_good, choose
from benchmarks.robustness.fronts import Point, above, point, write_fronts
from benchmarks.robustness.methods import ADAMW, VARIANTS
from benchmarks.robustness.runs import Book, Runs
from benchmarks.robustness.settings import SETTINGS, smoke
from benchmarks.robustness.training import PRETRAIN_STEPS, Task

SCREEN = ("digits", "classes")
ORDER = (*SCREEN, "code", "docstrings")
"""From cheap to dear: a variant that has no strength as good as any in the first ones goes no further."""


@dataclass(frozen=True)
class Scale:
    """How much of it."""

    variants: tuple[str, ...] = (*(variant.name for variant in VARIANTS), "SPD", "MAPS", "L2-SP")
    kept: int = 5
    strengths: range = range(4)
    tune_seeds: tuple[int, ...] = TUNE_SEEDS
    seeds: tuple[int, ...] = SEEDS
    pretrain_steps: int = PRETRAIN_STEPS


SMOKE = Scale((VARIANTS[0].name, VARIANTS[1].name), 1, range(1, 3), TUNE_SEEDS[:1], SEEDS[:2], 4)


class Search:
    """One setting's share of it. `main`: the book of the benchmark itself."""

    def __init__(self, name: str, main: Book, runs: Runs, scale: Scale) -> None:
        self.name, self._main, self._runs, self._scale = name, main, runs, scale
        tasks = {c: [Task(name, ADAMW, c, s, True) for s in scale.tune_seeds] for c in scale.strengths}
        adamw = {c: [line for line in map(main.get, own) if line] for c, own in tasks.items()}
        if not all(len(lines) == len(scale.tune_seeds) for lines in adamw.values()):
            raise SystemExit(f"run python -m benchmarks.robustness --setting {name} first")
        first = next(iter(adamw.values()))[0]
        self.kind = Tuned(first["higher_is_better"], first["examples"], SETTINGS[name].slack)
        validation = {c: [line["validation"] for line in lines] for c, lines in adamw.items()}
        self._base = choose(validation, replace(self.kind, slack=0.0))
        self._adamw: list[dict[str, Any]] = adamw[self._base]
        first_scores = {**first, "scores": first["zero_shot"]}
        self._curve = [_mean(lines) for lines in ([first_scores], *adamw.values())]

    def run(self, tasks: Sequence[tuple[str, int]], seeds: Sequence[int], *, validate: bool = False) -> None:
        """Train these variants, at these strengths, on these seeds; `validate`: no other score is wanted."""
        self._runs.prepare(self._scale.pretrain_steps)
        wanted = [Task(self.name, v, c, s, False, self._base) for v, c in tasks for s in seeds]
        known = self._validated if validate else self._main.get
        self._runs.do([task for task in wanted if known(task) is None])

    def good(self, variant: str) -> set[int]:
        """The strengths that validation cannot tell from the best one, or from AdamW."""
        tasks = {c: self._tasks(variant, c) for c in self._scale.strengths}
        lines = {c: [line for line in map(self._validated, own) if line] for c, own in tasks.items()}
        lines[-1] = self._adamw
        return as_good({c: [line["validation"] for line in own] for c, own in lines.items()}, self.kind)

    def gain(self, variant: str, strength: int) -> float:
        """How much better out of distribution than AdamW with the learning rate that is as good in it."""
        lines = map(self._runs.book.get, self._tasks(variant, strength))
        return above(_mean([line for line in lines if line]), self._curve)

    def _tasks(self, variant: str, strength: int) -> list[Task]:
        return [Task(self.name, variant, strength, s, False, self._base) for s in self._scale.tune_seeds]

    def _validated(self, task: Task) -> dict[str, Any] | None:
        """A line that has the task's score on the validation set; the package's rules were tuned before."""
        return self._runs.book.get(task) or self._main.get(replace(task, tune=True))


def _mean(lines: Sequence[Mapping[str, Any]]) -> Point:
    points = [point(line) for line in lines]
    return statistics.fmean(x for x, _ in points), statistics.fmean(y for _, y in points)


def defaults(searches: Sequence[Search], names: Sequence[str]) -> dict[str, int]:
    """The strength of each variant that is as good as any in all these settings, if there is one."""
    common = {name: set.intersection(*(s.good(name) for s in searches)) - {-1} for name in names}
    return {name: max(found) for name, found in common.items() if found}


def main() -> None:
    """Search, confirm, and write down what came out."""
    given = _arguments()
    scale, prefix = (SMOKE, "smoke-") if given.smoke else (Scale(), "")
    settings = {name: smoke(setting) if given.smoke else setting for name, setting in SETTINGS.items()}
    out: Path = given.out / "search"
    out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        searches = []
        for name in ORDER:
            setting = settings[name]
            runs = Runs(
                setting,
                Book(out / f"{name}.jsonl", setting, layers=False),
                given.work / f"{prefix}{name}",
                pool,
            )
            searches.append(Search(name, Book(given.out / f"{name}.jsonl", setting), runs, scale))
        found = _find(searches, scale)
        for search in searches:
            search.run(list(found.items()), scale.seeds)
    lines = {}
    for name, setting in settings.items():
        books = (Book(folder / f"{name}.jsonl", setting) for folder in (given.out, out))
        lines[name] = [line for book in books for line in book.lines]
    write_fronts(lines, scale.seeds, out)


def _find(searches: Sequence[Search], scale: Scale) -> dict[str, int]:
    """The variants that are worth trying everywhere, and their default strengths."""
    screen = [s for s in searches if s.name in SCREEN]
    for search in screen:
        search.run([(v, c) for v in scale.variants for c in scale.strengths], scale.tune_seeds)
    usual = defaults(screen, scale.variants)
    gains = {v: statistics.fmean(s.gain(v, c) for s in screen) for v, c in usual.items()}
    kept = sorted(gains, key=lambda name: -gains[name])[: scale.kept]
    print("kept:", ", ".join(f"{name} ({100 * gains[name]:+.1f} %)" for name in kept), flush=True)
    found = defaults(screen, kept)
    for number, search in enumerate(searches, start=1):
        search.run([(v, c) for v in found for c in scale.strengths], scale.tune_seeds, validate=True)
        found = defaults(searches[:number], list(found))
    print("default strengths:", found, flush=True)
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.robustness.search", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--smoke", action="store_true", help="too short to say anything")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("runs/robustness"), help="scratch files")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1), help="trainings at a time")
    given = parser.parse_args()
    if given.smoke and given.out.resolve() == RESULTS.resolve():
        parser.error("--smoke: name another --out than that of the real results")
    return given


if __name__ == "__main__":
    main()
