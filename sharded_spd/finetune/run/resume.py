"""What a job saves to resume later: finished trainings, and checkpoints of the unfinished one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from sharded_spd.checkpoint import Checkpoints, Resumed
from sharded_spd.errors import ConfigError
from sharded_spd.finetune.config import CheckpointConfig, JobConfig
from sharded_spd.finetune.engines.base import Engine
from sharded_spd.finetune.report.records import TrainingResult
from sharded_spd.finetune.world import World
from sharded_spd.projection.projector import Projector

AUTO = "auto"
"""For `--resume`: the newest run of this job that is not finished, or a new one."""

FREE = frozenset(
    {"engine", "ranks", "device", "output_dir", "eval_batch_size", "save", "checkpointing", "track"}
)
"""Settings that may differ from the resumed run: none of them changes a model or its scores."""

_PROGRESS = "progress.json"


class Progress:
    """The validations, choices and trainings of a run that are done, in `progress.json`, on every rank.

    The main rank writes, beside and then renamed.
    """

    def __init__(self, directory: Path, world: World) -> None:
        self._path, self._world = directory / _PROGRESS, world
        found = _read(self._path) if self._path.is_file() else {}
        known: dict[str, Any] | None = world.broadcast(found)
        try:
            if known is None:
                raise TypeError("no JSON object")
            self.validated: dict[str, float] = dict(known.get("validated", {}))
            self.results = [TrainingResult.load(entry) for entry in known.get("results", ())]
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{self._path} is damaged ({error}): remove it, and all trainings of the run start anew"
            ) from None
        self.finished = bool(known.get("finished", False))

    def add_validation(self, key: str, score: float) -> None:
        """A training that was scored on the validation set."""
        self.validated[key] = score
        self._write()

    def add_result(self, result: TrainingResult) -> None:
        """A training that was tested."""
        self.results.append(result)
        self._write()

    def finish(self) -> None:
        """Nothing is left to resume."""
        self.finished = True
        self._write()

    def _write(self) -> None:
        if not self._world.main:
            return
        results = [result.to_dict() for result in self.results]
        content = {"validated": self.validated, "results": results, "finished": self.finished}
        beside = self._path.with_suffix(".part")
        with open(beside, "w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self._path)


def find_run(config: JobConfig, resume: str) -> Path | None:
    """The run directory to resume; None if "auto" finds none.

    Raises:
        ConfigError: a directory that is no run, or a run of another job; it names the settings that differ.
    """
    if resume != AUTO:
        differing = _differing(config, Path(resume))
        if differing:
            raise ConfigError(
                f"--resume: {resume} is a run of another job: it differs in {', '.join(differing)}; resume "
                "it with its own settings (its config.json)"
            )
        return Path(resume)
    for directory in _runs(Path(config.output_dir)):
        try:
            if _differing(config, directory):
                continue
        except ConfigError:
            continue
        progress = _read(directory / _PROGRESS) or {}  # none: it ended before anything was done
        if not progress.get("finished"):
            return directory
    return None


def _runs(base: Path) -> Iterator[Path]:
    """`base`, `base-2`, `base-3`, ..., the newest first."""
    runs = {1: base} if base.is_dir() else {}
    if base.parent.is_dir():
        for path in base.parent.glob(f"{base.name}-*"):
            number = path.name.removeprefix(f"{base.name}-")
            if number.isdigit():
                runs[int(number)] = path
    for _, path in sorted(runs.items(), reverse=True):
        yield path


def _differing(config: JobConfig, directory: Path) -> list[str]:
    theirs = _read(directory / "config.json")
    if theirs is None:
        raise ConfigError(f"--resume: {directory} is no run: it has no readable config.json")
    own = json.loads(config.to_json())
    return [key for key in own if key not in FREE and own[key] != theirs.get(key)]


def _read(path: Path) -> dict[str, Any] | None:
    """A file's JSON object; None where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


class Keeper:
    """Checkpoints of one training while it runs, in a folder of their own."""

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        engine: Engine,
        optimizer: torch.optim.Optimizer,
        projector: Projector | None,
    ) -> None:
        self._live: dict[str, Any] = {"optimizer": optimizer, "projector": projector}
        self._engine, self._every, self._folder = engine, config.every, folder
        self._checkpoints = Checkpoints(folder, keep_last=config.keep_last, asynchronous=config.asynchronous)
        self.describe: Callable[[], Mapping[str, Any]] = dict
        self.adopt: Callable[[Resumed], None] = lambda resumed: None

    @property
    def kept(self) -> bool:
        """Whether there is a checkpoint to go on from, the same on every rank. Collective."""
        return self._checkpoints.latest() is not None

    def due(self, step: int) -> bool:
        """Whether to save after `step`."""
        return self._every > 0 and step % self._every == 0

    def restore(self, schedule: Any) -> int:
        """Load the newest complete checkpoint, if there is one; the number of steps that are done."""
        found = self._checkpoints.load(self._engine.model, **self._live, scheduler=schedule)
        if found is None:
            return 0
        self.adopt(found)
        return found.step

    def save(self, step: int, schedule: Any) -> None:
        """Save the training as it is after `step`."""
        self._checkpoints.save(
            step, self._engine.model, **self._live, scheduler=schedule, extra=dict(self.describe())
        )

    def wait(self) -> None:
        """Wait for a save in the background."""
        self._checkpoints.wait()

    def drop(self) -> None:
        """The training is done: its checkpoints are not needed any more."""
        self.wait()
        if self._engine.world.main:
            shutil.rmtree(self._folder, ignore_errors=True)
            with suppress(OSError):  # others are in it
                self._folder.parent.rmdir()
