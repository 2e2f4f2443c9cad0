"""Checkpoints of a training run: saved completely or not at all, resumed on any number of ranks."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.nn import Module
from torch.optim import Optimizer

from sharded_spd.checkpoint import deepspeed
from sharded_spd.checkpoint.codec import join, merge, split, tensor_names
from sharded_spd.checkpoint.contents import check_contents, described, encoded, live_of
from sharded_spd.checkpoint.folder import find_latest, folder_of, start_folder, steps_in
from sharded_spd.checkpoint.live import RNG, Live, merge_groups, quiet, states_in
from sharded_spd.checkpoint.ranks import Ranks
from sharded_spd.checkpoint.rng import set_rng_state
from sharded_spd.checkpoint.storage import METADATA, Reader, StagedPlanner, Writer, check_folder
from sharded_spd.engines.deepspeed import is_of_deepspeed
from sharded_spd.errors import CheckpointError, UnsupportedError
from sharded_spd.projection.projector import Projector

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where a run resumes: the saved step, its folder, and the saved `extra`."""

    step: int
    path: Path
    extra: Any


class Checkpoints:
    """Saves and loads a run's model, optimizer, projector, scheduler, random numbers and position.

    A folder `step-N` appears in `directory` only after every rank has written its shards and the marker: if a
    save is killed at any moment, the earlier checkpoints remain. Tensors are in safetensors files, the rest
    in JSON; nothing is pickled (except DeepSpeed's own files, for its engines). The constructor and all
    methods are collective. `directory` must be the same storage for all ranks. A failure on one rank, and
    arguments that differ between ranks, raise on all of them.

    Args:
        directory: where the folders go.
        keep_last: how many complete ones to keep; None: all.
        asynchronous: copy to host memory, continue training, and write in the background.
        group: the ranks that save together; None: all.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int | None = 3,
        asynchronous: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._with_ranks = dist.is_initialized()
        self._group = dist.group.WORLD if group is None and self._with_ranks else group
        self._keep, self._asynchronous = keep_last, asynchronous
        self._behind: dist.ProcessGroup | None = None
        self._running: tuple[Future[Any], Writer] | None = None

        def check() -> Path:
            if keep_last is not None and (type(keep_last) is not int or keep_last < 1):
                raise CheckpointError(f"keep_last: got {keep_last!r}; wanted 1 or more, or None to keep all")
            if asynchronous and group not in (None, dist.group.WORLD):
                # torch names a subset's new group by the number of groups on each rank, which may differ.
                raise UnsupportedError("asynchronous: wanted the group of all ranks, got a part of them")
            if self._group is not None and not isinstance(self._group, dist.ProcessGroup):
                raise CheckpointError(
                    "group: wanted a process group that this rank is in; make none elsewhere"
                )
            return Path(directory).absolute()

        self._ranks = Ranks([self._group] if isinstance(self._group, dist.ProcessGroup) else [])
        self.directory = self._ranks.agree(check, "directory")
        self._ranks.compare(
            operation="Checkpoints()",
            directory=str(self.directory),
            keep_last=keep_last,
            asynchronous=asynchronous,
        )

    def save(
        self,
        step: int,
        model: Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        *,
        projector: Projector | None = None,
        scheduler: Any = None,
        extra: Any = None,
    ) -> Path:
        """Save the run as it is after `step`; returns the path that the checkpoint will have.

        `model` may be a DeepSpeed engine, which brings its optimizer and scheduler. `extra`: numbers,
        strings, lists, dicts and tensors, the same on every rank: the data loader's position, say.

        Raises:
            CheckpointError: on every rank, if one could not write or return its state, or got other
                arguments; earlier checkpoints are untouched. With `asynchronous`, the next call or `wait`
                raises a failure in the background.
            UnsupportedError: an object keeps its state in a format of its own; on every rank.
        """
        self.wait()
        self._check_ranks()

        def check() -> Live:
            if type(step) is not int or step < 0:
                raise CheckpointError(f"step: got {step!r}; wanted a whole number, 0 or more")
            if self._asynchronous and is_of_deepspeed(model):
                raise UnsupportedError("asynchronous: DeepSpeed writes its own files; wanted False")
            return live_of(model, optimizer, projector, scheduler, self._ranks)

        live = self._ranks.agree(check, "save")
        self._ranks.compare(operation="save", step=step, what=live.parts)
        final = folder_of(self.directory, step)
        values: dict[str, Any] = {"extra": extra, "step": step}
        part: Path | None = None
        if is_of_deepspeed(model):
            part = self._ranks.shared(lambda: start_folder(final), f"{final}: cannot be written")
        try:
            if part is not None:
                deepspeed.save(model, live.projector, part)
            else:
                values.update(live.state())
            tensors, rest = self._ranks.agree(lambda: encoded(live, values), "the state of this rank")
        except Exception:
            if part is not None and self._ranks.first:
                shutil.rmtree(part, ignore_errors=True)
            raise
        facts = {
            "step": step,
            "world_size": 1 if self._group is None else self._group.size(),
            "torch": torch.__version__,
        }
        writer = Writer(final, rest, facts, self._keep, part)
        if self._asynchronous:
            self._running = (self._start(tensors, writer), writer)
        else:
            planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
            self._attempt(
                writer, lambda: dcp_save(tensors, storage_writer=writer, planner=planner, **self._where)
            )
        return final

    def _start(self, tensors: dict[str, Any], writer: Writer) -> Future[Any]:
        """Copy, and write in a thread, which begins only once every rank has its thread."""
        if self._group is not None and self._behind is None:
            # The saving thread's collectives must not mix with those of the training.
            self._behind = dist.new_group(backend="gloo")
        where = {"process_group": self._behind, "no_dist": self._group is None}
        everyone: Future[bool] = Future()

        def write(planner: StagedPlanner) -> None:
            if everyone.result():
                dcp_save(tensors, storage_writer=writer, planner=planner, **where)

        def start() -> Future[Any]:
            thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            future = thread.submit(write, StagedPlanner(tensors))
            thread.shutdown(wait=False)
            return future

        try:
            future = self._ranks.agree(start, "saving in the background could not start")
        except Exception:
            everyone.set_result(False)
            raise
        everyone.set_result(True)
        return future

    def wait(self) -> None:
        """Wait for a save in the background.

        Raises:
            CheckpointError: it failed; on every rank.
        """
        if self._running is not None:
            (future, writer), self._running = self._running, None
            self._attempt(writer, future.result)

    def _attempt(self, writer: Writer, action: Callable[[], object]) -> None:
        failed = f"{self.directory}: nothing was saved"

        def attempt() -> None:
            try:
                with quiet():
                    action()
            except CheckpointException as error:
                raise CheckpointError(f"{failed}: {_reason(error)}") from None

        try:
            self._ranks.agree(attempt, failed)
        except Exception:
            writer.clean_up()
            raise

    def latest(self) -> Path | None:
        """The newest complete checkpoint; logs a newer one that is incomplete."""
        self._ranks.compare(operation="latest")
        return self._latest()

    def _latest(self) -> Path | None:
        found = self._ranks.shared(
            lambda: find_latest(self.directory, check_folder), f"{self.directory}: cannot be read"
        )
        if self._ranks.first:
            for text in found.skipped:
                _LOG.warning("%s; it is passed over", text)
        return found.path

    def load(
        self,
        model: Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        *,
        projector: Projector | None = None,
        scheduler: Any = None,
        path: str | os.PathLike[str] = "auto",
    ) -> Resumed | None:
        """Load the newest complete checkpoint, or that at `path`; None if "auto" finds none.

        The model, the optimizer and the anchors must be set up as before, on any number of ranks and under
        any engine of the same kind of checkpoint (DeepSpeed has its own). At the same number of ranks the run
        resumes bit for bit. Ranks beyond those of the saved run keep their random state.

        Raises:
            CheckpointError: damaged, or of another model; on every rank, before anything is loaded.
            AnchorError: written with another anchor, names the layers; on every rank, also before loading.
            UnsupportedError: an object keeps its state in a format of its own; on every rank.
        """
        self.wait()
        self._check_ranks()
        ranks = self._ranks
        live, given = ranks.agree(
            lambda: (live_of(model, optimizer, projector, scheduler, ranks), Path(path)), "load"
        )
        ranks.compare(operation="load", path=str(path), what=live.parts)
        folder = self._latest() if path == "auto" else given
        if folder is None:
            return None
        marker = ranks.shared(lambda: check_folder(folder), f"{folder}: cannot be read")
        if path != "auto":
            self._warn_of_newer(folder, marker["step"])
        damaged = f"{folder}: is damaged"
        metadata, values, digest = ranks.agree(lambda: described(live, folder), damaged)
        ranks.compare(**{METADATA: digest})
        with ExitStack() as stack:
            template: dict[str, Any] = {}
            if not is_of_deepspeed(model):
                had = ranks.agree(lambda: states_in(metadata, values), damaged)
                template = stack.enter_context(live.template(had))
            state, drawn = self._read(template, metadata, values, live, folder)
            if is_of_deepspeed(model):
                deepspeed.load(model, live.projector, folder)
            if template:
                live.restore(state, f"{folder}: holds a state that does not fit this run")
            if scheduler is not None:
                ranks.agree(
                    lambda: scheduler.load_state_dict(state["scheduler"]),
                    f"{folder}: holds a state that does not fit this run's scheduler",
                )
        ranks.agree(lambda: set_rng_state(drawn), damaged)
        return Resumed(marker["step"], folder, state.get("extra"))

    def _read(
        self, template: dict[str, Any], metadata: Any, values: Any, live: Live, folder: Path
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The saved values for `template`, with scheduler and `extra`; and the random state."""
        prefix = f"{RNG}/{live.rank}/"

        def line_up() -> tuple[dict[str, Any], dict[str, Any]]:
            own, parts = split(template)
            check_contents(own, parts, metadata, values, folder)
            parts = {key: merge(part, values[key]) for key, part in parts.items()}
            if "optimizer" in parts:
                groups = split(template["optimizer"]["param_groups"], "optimizer/param_groups")[1]
                parts["optimizer"]["param_groups"] = merge_groups(groups, values["optimizer"]["param_groups"])
            parts.update({key: values[key] for key in ("extra", "scheduler") if key in values})
            others = [name for name in tensor_names(parts) if name not in own]
            others += [name for name in metadata.state_dict_metadata if name.startswith(prefix)]
            for name in others:
                stored: Any = metadata.state_dict_metadata[name]
                own[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
            return own, parts

        def read() -> Any:
            # torch's default fails if a rank has no row of an FSDP1 tensor.
            planner = DefaultLoadPlanner(flatten_sharded_tensors=False)
            try:
                with quiet():
                    dcp_load(own, storage_reader=Reader(folder, metadata), planner=planner, **self._where)
            except CheckpointException as error:
                raise CheckpointError(f"the checkpoint was not loaded: {_reason(error)}") from None
            return join(parts, own)

        own, parts = self._ranks.agree(line_up, f"{folder}: is damaged")
        state = self._ranks.agree(read, "the checkpoint was not loaded")
        drawn = {n.removeprefix(prefix): t for n, t in own.items() if n.startswith(prefix)}
        return state, drawn

    def _warn_of_newer(self, folder: Path, step: int) -> None:
        """Warn on the first rank; ignores a directory that cannot be read."""
        if not self._ranks.first:
            return
        with suppress(OSError):
            newer = [path.name for other, path in steps_in(self.directory) if other > step]
            if newer:
                text = "%s is loaded though %s is newer: 'auto' will go back to that; remove it"
                _LOG.warning(text, folder, newer[0])

    def _check_ranks(self) -> None:
        if dist.is_initialized() != self._with_ranks:
            raise CheckpointError(
                "the process group was started or ended after these Checkpoints were made; make them after "
                "init_process_group, and use them before destroy_process_group"
            )

    @property
    def _where(self) -> dict[str, Any]:
        return {"process_group": self._group, "no_dist": self._group is None}


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        rank, (inner, _) = min(error.failures.items())
        return f"rank {rank}: {_reason(inner)}"
    return f"{type(error).__name__}: {error}" if not isinstance(error, CheckpointError) else str(error)
