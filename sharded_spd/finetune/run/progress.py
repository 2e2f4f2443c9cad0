"""The progress bar of a job on a terminal, plain lines elsewhere, silence on all ranks but the main one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from sharded_spd.finetune.report.records import Evaluation
from sharded_spd.finetune.run.loop import StepReport

PLAIN_SECONDS = 10.0
"""At least how long between two plain lines of one training."""


class _TwoLines(Progress):
    """The bar, and the figures of the last step below it: together they are wider than many terminals."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Both lines."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text("  ".join(task.fields["figures"]), style="dim", no_wrap=True)


class Display:
    """One bar over all trainings of a job, with the figures of the last step."""

    def __init__(self, *, visible: bool) -> None:
        self.console = Console(quiet=not visible, highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._title = ""
        self._done = self._expected = 0
        self._last_line = time.monotonic()
        if visible and self.console.is_terminal:
            self._bar = _TwoLines(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:3.0f}%"),
                TimeRemainingColumn(compact=True),
                TextColumn("left"),
                console=self.console,
                expand=True,
                transient=True,
            )
            self._task = self._bar.add_task("starting", total=None, figures=())

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin_stage(self, steps: int) -> None:
        """Start a bar of so many steps."""
        self._done, self._expected = 0, steps
        if self._bar is not None and self._task is not None:
            self._bar.reset(self._task, total=steps, completed=0, figures=())

    def begin(self, title: str) -> None:
        """Name the training that the next steps belong to."""
        self._title = title
        self._last_line = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=title)

    def advance(
        self,
        report: StepReport,
        *,
        steps: int,
        activation_rate: float | None = None,
        deviation: float | None = None,
    ) -> None:
        """Move on by `steps`."""
        self._done += steps
        figures = [f"loss {report.loss:.3f}", f"lr {report.lr:.0e}".replace("e-0", "e-")]
        if activation_rate is not None:
            figures.append(f"pulled {activation_rate:.0%}")
        if deviation is not None:
            figures.append(f"moved {deviation:.1%}")
        figures.append(f"{report.samples_per_second:.3g}/s")
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, figures=figures)
        elif time.monotonic() - self._last_line > PLAIN_SECONDS:
            self._last_line = time.monotonic()
            share = f"{self._done / max(1, self._expected):.0%} done"
            self.say(f"{self._title}: step {report.step}/{report.steps}  {'  '.join(figures)}  ({share})")

    def evaluated(self, found: Evaluation) -> None:
        """Tell an evaluation where there is no bar."""
        if self._bar is None:
            ood = "" if math.isnan(found.ood) else f"  OOD {found.ood:.1f}"
            kept = "".join(f"  retained: {name} {value:.1f}" for name, value in found.retained.items())
            self.say(
                f"{self._title}: step {found.step}, epoch {found.epoch:.3g}  ID {found.id:.1f}{ood}{kept}"
            )

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, soft_wrap=True)
