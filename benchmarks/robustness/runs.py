"""The trainings of a setting: several at a time, each written down as soon as it is done."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.robustness.settings import Setting
from benchmarks.robustness.training import Task, prepare, run


class Book:
    """The trainings of one setting that are done, a line each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.done: dict[str, dict[str, Any]] = {found["key"]: found for found in map(json.loads, lines)}

    def add(self, task: Task, found: dict[str, Any]) -> None:
        """Write down one more."""
        line = {"key": task.key, **found}
        self.done[task.key] = line
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class Runs:
    """Where the trainings of one setting happen: those in `book` are not done again."""

    def __init__(self, setting: Setting, book: Book, folder: Path, pool: ProcessPoolExecutor) -> None:
        self._setting, self._folder, self._pool = setting, folder, pool
        self.book = book
        self._began = time.perf_counter()
        self._given: list[str] = []

    def prepare(self, steps: int, *, at: Path | None = None) -> None:
        """Make the pre-trained model, or find it; `at`: elsewhere than with the trainings."""
        self._given = self._pool.submit(prepare, self._setting, at or self._folder, steps=steps).result()

    def do(self, tasks: Sequence[Task]) -> None:
        """Run what is not done yet."""
        rest = [task for task in tasks if task.key not in self.book.done]
        waiting = {
            self._pool.submit(run, task, self._setting, self._given, self._folder): task for task in rest
        }
        for number, done in enumerate(as_completed(waiting), start=1):
            self.book.add(waiting[done], done.result())
            seconds = time.perf_counter() - self._began
            print(f"{seconds:6.0f} s  {number}/{len(rest)}  {waiting[done].key}", flush=True)
