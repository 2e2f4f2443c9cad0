"""Does it help? Fine-tuning methods side by side, in and out of distribution.

    python -m benchmarks.robustness                     # every setting; goes on where it stopped
    python -m benchmarks.robustness --setting digits    # one of them
    python -m benchmarks.robustness --smoke --out DIR   # all of it in minutes, and the figures mean nothing

Every method is tuned among four settings by the in-distribution validation set alone, on two seeds, and then
trained on five others. Each training is a line of OUT/SETTING.jsonl; the summary is written from those lines.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a training per core

from benchmarks.bench.machine import describe
from benchmarks.robustness.choose import Tuned, choose
from benchmarks.robustness.methods import ADAMW, LOW, METHODS, WISE
from benchmarks.robustness.runs import Book, Runs
from benchmarks.robustness.settings import SETTINGS, Setting, smoke
from benchmarks.robustness.summary import summarise
from benchmarks.robustness.training import PRETRAIN_STEPS, Task

RESULTS = Path(__file__).resolve().parents[1] / "results" / "robustness"
TUNE_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4)


def main() -> None:
    """Run what is asked for, and summarise what is there."""
    given = _arguments()
    names = [given.setting] if given.setting else list(SETTINGS)
    given.out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        for name in names:
            setting = smoke(SETTINGS[name]) if given.smoke else SETTINGS[name]
            _Bench(name, setting, given, pool).run()
    (given.out / "machine.json").write_text(json.dumps(describe("cpu"), indent=1), encoding="utf-8")
    there = [name for name in SETTINGS if (given.out / f"{name}.jsonl").is_file()]
    summarise({name: Book(given.out / f"{name}.jsonl", SETTINGS[name]).lines for name in there}, given.out)


class _Bench:
    """One setting, from the pre-trained model to the last training."""

    def __init__(
        self, name: str, setting: Setting, given: argparse.Namespace, pool: ProcessPoolExecutor
    ) -> None:
        self._name, self._setting = name, setting
        self._smoke: bool = given.smoke
        folder = Path(given.work) / (f"smoke-{name}" if given.smoke else name)
        self._runs = Runs(setting, Book(given.out / f"{name}.jsonl", setting), folder, pool)
        self._methods = [m for m in METHODS if setting.probe or m.name != "LP-FT"]
        self._tune_seeds = TUNE_SEEDS[:1] if given.smoke else TUNE_SEEDS
        self._seeds = SEEDS[:2] if given.smoke else SEEDS

    def run(self) -> None:
        """Tune, choose, train."""
        self._runs.prepare(4 if self._smoke else PRETRAIN_STEPS)
        tried = range(1, 3) if self._smoke else range(4)
        self._tune([ADAMW], tried, of=0)
        base = self._choose(ADAMW, ADAMW, tried, slack=0.0)
        chosen = {ADAMW: base, LOW: self._choose(LOW, ADAMW, tried)}
        own = [m.name for m in self._methods if m.name not in chosen]
        self._tune([*own, WISE], tried, of=base)
        chosen |= {m: self._choose(m, m, tried, of=base) for m in (*own, WISE)}
        finals = [Task(self._name, m, c, s, False, base) for m, c in chosen.items() for s in self._seeds]
        self._runs.do([task for task in finals if task.method != WISE])
        self._runs.do([task for task in finals if task.method == WISE])  # takes the weights of AdamW's

    def _tune(self, methods: Sequence[str], candidates: Sequence[int], of: int) -> None:
        tasks = [(m, c, s) for m in methods for c in candidates for s in self._tune_seeds]
        self._runs.do([Task(self._name, m, c, s, True, of) for m, c, s in tasks])

    def _choose(
        self, name: str, method: str, candidates: Sequence[int], of: int = 0, slack: float | None = None
    ) -> int:
        """The candidate for `name` among those tried of `method`; `slack`: another than the setting's."""
        tasks = {c: [Task(self._name, method, c, s, True, of) for s in self._tune_seeds] for c in candidates}
        found = {c: self._runs.book.validation(own) for c, own in tasks.items()}
        any_line = next(line for line in self._runs.book.lines if "percent" in line)
        slack = self._setting.slack if slack is None else slack
        best = choose(found, Tuned(any_line["higher_is_better"], any_line["examples"], slack))
        print(f"{self._name}: {name}: candidate {best} of {found}", flush=True)
        return best


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.robustness", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--setting", choices=list(SETTINGS))
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
