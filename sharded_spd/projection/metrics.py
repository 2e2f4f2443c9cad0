"""Telemetry of a run's steps: numbers of the last one, JSON lines, warnings."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sharded_spd.binding import warnings as warn
from sharded_spd.binding.records import Binding, flat
from sharded_spd.errors import ConfigError
from sharded_spd.projection.layers import LayerTable
from sharded_spd.rules.statistics import CHUNK, fixed_sum
from sharded_spd.sharding.collectives import flood, union
from sharded_spd.sharding.layout import BoundShard


class Monitor:
    """Counts engine steps and reports them; between reports nothing leaves the device."""

    def __init__(self, every: int = 0, path: str | None = None) -> None:
        self._every, self._path = every, path
        self._log: JsonLines | None = None
        self._excess = LateScalar()
        self._warned = False
        self._unwritten = False
        self._counter = StepCounter()

    @property
    def num_steps(self) -> int:
        """Engine steps in which something moved; waits for the device where a scaler may have skipped one."""
        return self._counter.read()

    @num_steps.setter
    def num_steps(self, number: int) -> None:
        self._counter.start(number)

    def open(self, first: bool) -> None:
        """Check that the file can be written; only the `first` rank writes it.

        Raises:
            ConfigError: it cannot be opened.
        """
        if not first or self._path is None or self._log is not None:
            return
        try:
            self._log = JsonLines(self._path)
        except OSError as error:
            raise ConfigError(
                f"telemetry.path: {self._path} cannot be opened for appending: {error.strerror}; give a "
                "file that the first rank can write"
            ) from error

    def note(self, moves: bool, skipped: Tensor | None) -> None:
        """Note an inner step: whether it moves a layer, and which layers `[num_layers]` a scaler skipped."""
        self._counter.note(moves, skipped)

    def step(self, plans: Sequence[LayerTable], norms: Mapping[str, float]) -> None:
        """End an engine step; it does not count if nothing moved, as far as the host knows."""
        if not self._counter.step():
            return
        self._watch(plans)
        if self._log is not None and self._every and self._counter.seen % self._every == 0:
            self._write(self._log, self.metrics(plans, norms))

    def _write(self, log: JsonLines, record: Mapping[str, Any]) -> None:
        """Warn, not raise: a full disk must not end one rank's training and leave the others waiting."""
        try:
            log.write(record)
        except OSError as error:
            if not self._unwritten:
                self._unwritten = True
                warn.about_telemetry(self._path, error)

    def metrics(
        self, plans: Sequence[LayerTable], norms: Mapping[str, float], ranks: ProcessGroup | None = None
    ) -> dict[str, Any]:
        """Numbers of the last engine step, for the layers of all `ranks`; waits for the device."""
        reports = [
            (layers.fqns, plan.reports[layers.number])
            for plan in plans
            for layers in plan.rules
            if layers.number in plan.reports and layers.rule.spec.anchored
        ]
        frozen = {fqn for plan in plans for fqn in plan.frozen}
        return {"step": self.num_steps, **summarize(union(numbers_of(reports, norms, frozen), ranks))}

    def _watch(self, plans: Sequence[LayerTable]) -> None:
        """Warn once about a pull above 1; on a GPU some steps late, without waiting."""
        if self._warned:
            return
        reports = [
            report["s"].nan_to_num(nan=0.0).max() for plan in plans for report in plan.reports.values()
        ]
        if reports and reports[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return  # events must not be queried during graph capture
        if reports:
            self._excess.post(
                torch.stack([s.to(reports[0].device, non_blocking=True) for s in reports]).max()
            )
        excess = self._excess.take()
        if excess is not None and excess > 1:
            self._warned = True
            warn.about_excess(excess)


class LateScalar:
    """A number computed on the device now and read on the host later, without waiting."""

    def __init__(self) -> None:
        self._copy: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def post(self, value: Tensor) -> None:
        """Start copying a 0-d tensor; a no-op while a copy is under way."""
        if self._copy is not None:
            return
        if value.device.type == "cuda":
            self._copy = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._copy.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._copy = value.clone()

    def take(self) -> float | None:
        """The posted number once it has arrived, else None."""
        if self._copy is None or (self._event is not None and not self._event.query()):
            return None
        number = float(self._copy)
        self._copy = self._event = None
        return number


class StepCounter:
    """Counts engine steps in which something moved; a scaler's skips are counted on the device."""

    def __init__(self) -> None:
        self.seen = 0
        """The same, plus those that only the GPU knows were skipped."""
        self._known = 0
        self._on_device: Tensor | None = None
        self._moved = False
        self._skipped: list[Tensor] = []

    def start(self, number: int) -> None:
        """Continue counting from `number`."""
        self.seen = self._known = number
        self._on_device = None

    def read(self) -> int:
        """The number of steps; waits for the device where it counts."""
        return self._known + (int(self._on_device) if self._on_device is not None else 0)

    def note(self, moves: bool, skipped: Tensor | None) -> None:
        """Note an inner step of the engine step under way; see `Monitor.note`."""
        if moves and skipped is not None and skipped.numel():
            self._skipped.append(skipped.all())
        self._moved |= moves and skipped is None

    def step(self) -> bool:
        """End the engine step; return whether something moved in it, True if the host cannot tell."""
        moved, skipped = self._moved, self._skipped
        self._moved, self._skipped = False, []
        if not moved and skipped:
            first = skipped[0]
            moving = ~torch.stack([one.to(first.device, non_blocking=True) for one in skipped]).all()
            if not first.is_cuda:
                moved = bool(moving)
            elif torch.cuda.is_current_stream_capturing():
                moved = True  # a captured graph does not run now
            else:
                total = (
                    self._on_device
                    if self._on_device is not None
                    else torch.zeros_like(moving, dtype=torch.long)
                )
                self._on_device = total.to(first.device) + moving
                self.seen += 1
                return True
        self._known += moved
        self.seen += moved
        return moved


def is_first(groups: Sequence[ProcessGroup]) -> bool:
    """Whether this is the lowest of the ranks that `groups` connect; collective over them.

    Without groups: the lowest of the job, which may contain replicas that no group shows.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    return rank == (flood([(rank,)], groups)[0][0] if groups else 0)


@torch.no_grad()
def measure_deviation(binding: Binding, shards: Sequence[BoundShard]) -> tuple[list[str], Tensor]:
    """The anchored layers, and this rank's share of |w - w0|^2 now, float64 `[num_layers]`.

    NaN for a frozen layer that was loaded after binding.

    Raises:
        AnchorError: the file of an on-disk anchor has changed.
    """
    binding.check_files()
    pieces = {p.layer: (shard, p) for shard in shards for p in shard.slices if p.layer in binding.held}
    fqns = [fqn for fqn in binding.layout.fqns if fqn in pieces]
    sums = torch.zeros(len(fqns), dtype=torch.float64)
    for i, fqn in enumerate(fqns):
        shard, piece = pieces[fqn]
        held = binding.held[fqn]
        weight = flat(shard.tensor)[piece.offset : piece.offset + piece.numel]
        if held.pending:
            sums[i] = 0.0 if binding.in_place(held, weight) else torch.nan
            continue
        for begin in range(0, weight.numel(), CHUNK):
            delta = weight[begin : begin + CHUNK].double()
            if held.values is not None:
                delta = delta - held.values[begin : begin + CHUNK].to(delta.device).double()
            sums[i] += fixed_sum(delta * delta).to(sums.device)
    return fqns, sums


def numbers_of(
    reports: Sequence[tuple[Sequence[str], Mapping[str, Tensor]]],
    norms: Mapping[str, float],
    frozen: Set[str] = frozenset(),
) -> dict[str, dict[str, float]]:
    """Each layer's numbers from the reports of one step; waits for the device once.

    Args:
        reports: for each rule, its layers' FQNs and `[num_layers]` tensors: "s" (NaN: the rule has none per
            layer, and the activation rate leaves them out), "nonfinite" and what the rule adds.
        norms: |w0| of each layer.
        frozen: layers to leave out: only some engines have them in their optimizer.
    """
    flat = [t.double() for _, report in reports for t in report.values()]
    numbers = iter(torch.cat([t.to(flat[0].device) for t in flat]).tolist() if flat else [])
    layers: dict[str, dict[str, float]] = {}
    for fqns, report in reports:
        for name in report:
            for fqn in fqns:
                layers.setdefault(fqn, {})[name] = next(numbers)
    for fqn, values in layers.items():
        values["norm"] = norms.get(fqn, 0.0)
    return {fqn: values for fqn, values in layers.items() if fqn not in frozen}


def summarize(numbers: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The output of `numbers_of`, of one rank or several merged, with totals for the whole model."""
    layers = {fqn: dict(values) for fqn, values in numbers.items()}
    nonfinite = [fqn for fqn, values in layers.items() if values.pop("nonfinite", 0.0)]
    norms = {fqn: values.pop("norm") for fqn, values in layers.items()}
    for fqn, values in layers.items():
        if math.isnan(values.get("deviation", 0.0)):  # it did not step
            del values["deviation"]
        if "deviation" in values and norms[fqn] > 0:
            values["deviation_rel"] = values["deviation"] / norms[fqn]
        if math.isnan(values["s"]):
            del values["s"]
    pulls = [values["s"] for values in layers.values() if "s" in values]
    rate = sum(s > 0 for s in pulls) / max(len(pulls), 1)
    summary: dict[str, Any] = {
        "num_layers": len(layers),
        "activation_rate": rate if pulls or not layers else math.nan,
        "pulls_above_one": sum(s > 1 for s in pulls),
        "nonfinite_layers": nonfinite,
    }
    deviations = [values["deviation"] for values in layers.values() if "deviation" in values]
    if deviations:
        summary["deviation"] = math.sqrt(sum(d * d for d in deviations))
        total = math.sqrt(sum(norms[fqn] ** 2 for fqn, values in layers.items() if "deviation" in values))
        if total > 0:
            summary["deviation_rel"] = summary["deviation"] / total
    return {**summary, "layers": layers}


class JsonLines:
    """Appends records to a file, one JSON object per line; NaN and infinities become null."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.path.abspath(path)
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        with open(self._path, "ab"):
            pass

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; the file is closed again, so that a killed run loses nothing written.

        Raises:
            OSError: it cannot be written; the file stays as it was.
        """
        line = (json.dumps(_plain(record), allow_nan=False) + "\n").encode()
        with open(self._path, "ab", buffering=0) as file:
            size = file.tell() if file.seekable() else None
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                if size is not None:  # half a line would spoil the next one
                    with suppress(OSError):
                        file.truncate(size)
                raise


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
