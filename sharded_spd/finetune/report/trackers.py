"""Where the figures of a run go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sharded_spd.errors import ConfigError
from sharded_spd.finetune.config import JSONL


class Tracker(Protocol):
    """One training in a tracking library."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write figures of a step."""

    def close(self) -> None:
        """Write what is still held back."""


class Identities:
    """Under which names libraries know a run's trainings, in trackers.json, so that a resumed run goes on."""

    def __init__(self, directory: Path) -> None:
        self._path, self._lock = directory / "trackers.json", threading.Lock()
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        self._known: dict[str, str] = found if isinstance(found, dict) else {}

    def of(self, key: str, make: Callable[[], str]) -> str:
        """The name that is kept for `key`, made once."""
        with self._lock:
            known = self._known.get(key)
        if known is not None:
            return known
        made = make()  # may take long, or for ever
        with self._lock:
            self._known[key] = made
            beside = self._path.with_suffix(".part")
            beside.write_text(json.dumps(self._known), encoding="utf-8")
            os.replace(beside, self._path)
        return made


class _TensorBoard:
    def __init__(
        self, directory: Path, title: str, config: Mapping[str, Any], first_step: int, known: Identities
    ) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        folder = directory / "tensorboard" / _plain(title, r"[^\w.=-]+")
        # What a run had written after the checkpoint that it goes on from is hidden.
        purge = first_step if folder.exists() else None
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(
        self, directory: Path, title: str, config: Mapping[str, Any], first_step: int, known: Identities
    ) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "sharded_spd"),
            dir=str(directory),
            id=known.of(f"wandb {title}", lambda: uuid.uuid4().hex[:12]),
            name=title,
            group=os.environ.get("WANDB_RUN_GROUP", directory.name),
            config=dict(config),
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )
        # The step is a figure of its own: a resumed run may write a step again.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(
        self, directory: Path, title: str, config: Mapping[str, Any], first_step: int, known: Identities
    ) -> None:
        # MLflow 3 asks for consent to its local file store.
        if "MLFLOW_TRACKING_URI" not in os.environ:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow = importlib.import_module("mlflow")
        self._metric = mlflow.entities.Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI", (directory / "mlflow").absolute().as_uri())
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        self._run = known.of(f"mlflow {title}", lambda: self._make(directory, title, config))
        self._client.update_run(self._run, status="RUNNING")

    def _make(self, directory: Path, title: str, config: Mapping[str, Any]) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "sharded_spd")
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        tags = {"sharded_spd.directory": str(directory)}
        run = str(self._client.create_run(experiment, run_name=title, tags=tags).info.run_id)
        for key, value in config.items():
            self._client.log_param(run, _plain(key, r"[^\w./ -]+"), str(value)[:500])
        return run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        import time

        now = int(time.time() * 1000)
        entries = [self._metric(_plain(k, r"[^\w./ -]+"), v, now, step) for k, v in values.items()]
        self._client.log_batch(self._run, metrics=entries)

    def close(self) -> None:
        self._client.set_terminated(self._run)


TRACKERS: Mapping[str, Callable[..., Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
}
"""By the name of the library, which is also the name of the extra."""


def check_trackers(names: Sequence[str], *, load: bool = False) -> None:
    """Find out whether the libraries are there; with `load` by importing them.

    Raises:
        ConfigError: one is not installed, or cannot be imported; it names the extra.
    """
    for name in names:
        if name == JSONL:
            continue
        try:
            if importlib.util.find_spec(name) is None:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if load:
                importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
        except ImportError as error:
            raise ConfigError(
                f"track: {name} cannot be imported ({error}); pip install 'sharded_spd[{name}]' brings it"
            ) from None


def _plain(text: str, pattern: str) -> str:
    return re.sub(pattern, "_", text)
