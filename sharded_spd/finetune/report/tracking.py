"""The events of a run as figures of trackers, each training a run of its own there."""

from __future__ import annotations

import json
import math
import queue
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sharded_spd.finetune.config import JSONL
from sharded_spd.finetune.report.trackers import TRACKERS, Identities, Tracker

PATIENCE = 120.0
"""Seconds that trackers have together at the end of a run to write what they still hold."""

HURRY = 15.0
"""The same where the run was stopped: a scheduler may kill it soon."""

HELD = 10_000
"""Events that wait for a tracker at most."""

_TAKEN = frozenset({"zero-shot", "pretrain", "resumed", "step", "evaluation", "trained", "validation", "end"})
_STEP = ("loss", "lr", "grad_norm", "activation_rate", "deviation", "samples_per_second", "epoch")


class Tracking:
    """Passes events to the trackers, each on its own thread: none blocks the training or another tracker.

    One that fails, or does not answer, gives one warning and is skipped from then on.
    """

    def __init__(self, names: Sequence[str], directory: Path, config: Mapping[str, Any]) -> None:
        known = Identities(directory)
        self._lines = [
            _Line(name, _Follower(TRACKERS[name], directory, config, known))
            for name in dict.fromkeys(names)
            if name != JSONL
        ]

    def record(self, event: str, fields: Mapping[str, Any]) -> None:
        """Take an event of `Recorder.write`."""
        if event in _TAKEN:
            for line in self._lines:
                line.put((event, fields))
        self._warn()

    def close(self, *, patience: float = PATIENCE) -> None:
        """Wait until the trackers have written everything, all together at most `patience` seconds."""
        deadline = time.monotonic() + patience
        for line in self._lines:
            line.put(None)
        for line in self._lines:
            line.finish(max(0.0, deadline - time.monotonic()))
        self._warn()
        self._lines = []

    def drain(self, *, patience: float) -> None:
        """Where a run fails: wait until what is known is written; trackers are told of no end."""
        deadline = time.monotonic() + patience
        while any(line.busy for line in self._lines) and time.monotonic() < deadline:
            time.sleep(0.02)

    def _warn(self) -> None:
        for line in self._lines:
            problem, line.problem = line.problem, None
            if problem is not None:
                warnings.warn(
                    f"track: {line.title} {problem} and gets nothing more of this run; the training goes on, "
                    "metrics.jsonl has its figures",
                    stacklevel=3,
                )


def left_behind() -> bool:
    """Whether the thread of an unresponsive tracker is still alive, which may block the process's exit."""
    return any(isinstance(thread, _Line) and thread.is_alive() for thread in threading.enumerate())


class _Line(threading.Thread):
    """What waits for one tracker, and the thread that hands it on; the main thread tells a `problem`."""

    def __init__(self, title: str, follower: _Follower) -> None:
        super().__init__(name=f"track {title}", daemon=True)
        self.title = title
        self.problem: str | None = None
        self._follower, self._over = follower, False
        self._waiting: queue.Queue[tuple[str, Mapping[str, Any]] | None] = queue.Queue(HELD)

    def put(self, entry: tuple[str, Mapping[str, Any]] | None) -> None:
        """Have it handed on; None: there is nothing more. Never waits."""
        if self._over:
            return
        if self.ident is None:
            self.start()
        try:
            self._waiting.put_nowait(entry)
        except queue.Full:
            self._over, self.problem = True, f"has not taken {HELD} events"

    def run(self) -> None:
        """Hand on until there is nothing more, the library fails, or nobody waits for it any longer."""
        try:
            while (entry := self._waiting.get()) is not None and not self._over:
                self._follower.record(*entry)
                self._waiting.task_done()
            self._follower.close()
        except Exception as error:  # whatever a library raises, the training goes on
            self.problem = f"failed ({type(error).__name__}: {error!s:.300})"
        self._over = True

    @property
    def busy(self) -> bool:
        """Whether something is not written yet."""
        return not self._over and self._waiting.unfinished_tasks > 0

    def finish(self, seconds: float) -> None:
        """Wait for the last of it."""
        if self._over or self.ident is None:
            return
        self.join(seconds)
        if self.is_alive() and not self._over:
            self._over, self.problem = True, f"does not answer ({self._waiting.qsize() - 1} events wait)"


class _Follower:
    """One tracking library, fed with events: each training is a run of its own there."""

    def __init__(
        self, make: Callable[..., Tracker], directory: Path, config: Mapping[str, Any], known: Identities
    ) -> None:
        self._make, self._known = make, known
        self._directory, self._config = directory, config
        self._open: Tracker | None = None
        self._title: str | None = None
        self._first = 0
        self._zero_shot: dict[int, Mapping[str, Any]] = {}

    def record(self, event: str, fields: Mapping[str, Any]) -> None:
        """Take one of the events `_TAKEN`."""
        if event == "zero-shot":
            self._zero_shot[int(fields["seed"])] = fields
        elif event == "pretrain":
            self._log("pretrain", fields["step"], {f"train/{k}": fields[k] for k in ("loss", "lr")}, fields)
        elif event == "resumed":
            self._first = int(fields["step"]) + 1
        elif event == "step":
            values = {f"train/{k}": fields[k] for k in _STEP if fields.get(k) is not None}
            self._log(title_of(fields), fields["step"], values, fields)
        elif event == "evaluation":
            self._log(title_of(fields), fields["step"], _by_set(fields), fields)
        else:
            self.close()

    def _log(self, title: str, step: int, values: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        if self._open is None or title != self._title:
            self.close()
            self._open, self._title = self._begin(title, tags), title
        self._open.log(step, _finite(values))

    def _begin(self, title: str, tags: Mapping[str, Any]) -> Tracker:
        own = {k: tags[k] for k in ("method", "weight_decay", "seed") if k in tags}
        first, self._first = self._first, 0
        tracker = self._make(self._directory, title, {**flat(self._config), **own}, first, self._known)
        if tags.get("purpose") == "compare" and first == 0 and self._zero_shot:
            seen = self._zero_shot.get(int(tags["seed"]), next(iter(self._zero_shot.values())))
            tracker.log(0, _finite(_by_set(seen)))
        return tracker

    def close(self) -> None:
        """End the training that is open."""
        opened, self._open = self._open, None
        if opened is not None:
            opened.close()


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)}


def method_of(tags: Mapping[str, Any]) -> str:
    """`spd λ=2`."""
    strength = "" if tags.get("weight_decay") is None else f" λ={tags['weight_decay']:g}"
    return f"{tags['method']}{strength}"


def title_of(tags: Mapping[str, Any]) -> str:
    """`spd λ=2 seed 0`, with `choosing` before it where a strength is being chosen."""
    choosing = "choosing " if tags.get("purpose") == "select" else ""
    return f"{choosing}{method_of(tags)} seed {tags['seed']}"


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `train.lr`, values as texts or numbers."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found.update(flat(value, f"{prefix}{key}."))
        else:
            plain = isinstance(value, (str, int, float, type(None)))
            found[f"{prefix}{key}"] = value if plain else json.dumps(value)
    return found


def _by_set(found: Mapping[str, Any]) -> dict[str, Any]:
    metrics: Mapping[str, Mapping[str, Any]] = found["metrics"]
    sets = {f"eval/{data}/{name}": v for data, own in metrics.items() for name, v in own.items()}
    return sets | {f"eval/retained/{name}": v for name, v in (found.get("retained") or {}).items()}
