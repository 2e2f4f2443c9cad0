"""The trainings of a setting: several at a time, each written down as soon as it is done."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.robustness.methods import WISE
from benchmarks.robustness.settings import Setting
from benchmarks.robustness.training import Task, prepare, run, scratch, settings_of, weights_of


class Book:
    """The trainings of one setting that are done, a line each; other settings than today's do not count.

    `layers`: whether the distance of each layer is kept, which is most of a line.
    """

    def __init__(self, path: Path, setting: Setting, *, layers: bool = True) -> None:
        self._path, self._setting, self._layers = path, setting, layers
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a run was killed while it wrote the last line
            path.write_text(whole, encoding="utf-8")
        self._done: dict[str, dict[str, Any]] = {
            found["key"]: found for found in map(json.loads, whole.splitlines())
        }

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All that is written, in its order."""
        return list(self._done.values())

    def get(self, task: Task) -> dict[str, Any] | None:
        """The task's line, if it has been done as it would be done now."""
        line = self._done.get(task.key)
        return line if line and line["settings"] == settings_of(task, self._setting) else None

    def validation(self, tasks: Sequence[Task]) -> list[float]:
        """Their scores on the validation set; all have been done."""
        return [line["validation"] for line in map(self.get, tasks) if line is not None]

    def add(self, task: Task, found: dict[str, Any]) -> None:
        """Write down one more."""
        line = {"key": task.key, "settings": settings_of(task, self._setting), **found}
        if not self._layers:
            line.pop("layers", None)
        self._done.pop(task.key, None)
        self._done[task.key] = line
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class Runs:
    """Where the trainings of one setting happen: those in `book` are not done again."""

    def __init__(self, setting: Setting, book: Book, folder: Path, pool: ProcessPoolExecutor) -> None:
        self._setting, self._folder, self._pool = setting, folder, pool
        self.book = book
        self._began = time.perf_counter()
        self._given: list[str] = []

    def prepare(self, steps: int) -> None:
        """Make the pre-trained model, or find it."""
        self._given = self._pool.submit(prepare, self._setting, self._folder, steps=steps).result()

    def do(self, tasks: Sequence[Task]) -> None:
        """Run what is not done yet; before WiSE-FT what it takes the weights of, where they are gone.

        Raises:
            Exception: what the first training raised that failed, after all others.
        """
        rest = [task for task in tasks if self.book.get(task) is None]
        ends = dict.fromkeys(weights_of(task) for task in rest if task.method == WISE)
        self._run([task for task in ends if not self._weights(task).exists()])
        self._run(rest)

    def _weights(self, task: Task) -> Path:
        return self._folder / scratch(task, self._setting) / "checkpoint"

    def _run(self, tasks: Sequence[Task]) -> None:
        waiting = {
            self._pool.submit(run, task, self._setting, self._given, self._folder): task for task in tasks
        }
        failed: Exception | None = None
        for number, done in enumerate(as_completed(waiting), start=1):
            task, seconds = waiting[done], time.perf_counter() - self._began
            try:
                self.book.add(task, done.result())
            except Exception as error:
                failed = failed or error
                print(f"{task.key}: {error!r}", flush=True)
            print(f"{seconds:6.0f} s  {number}/{len(tasks)}  {task.key}", flush=True)
        if failed is not None:
            raise failed
