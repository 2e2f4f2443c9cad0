"""What ranks exchange in a step: sums of statistics, failures, and settings that differ.

A rank that fails still takes part in the step's reduction and reports its failure there, as one number; so no
rank waits for it, and all raise together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sharded_spd.binding.checks import NUM_ROWS, check_first_steps
from sharded_spd.binding.records import Unverified
from sharded_spd.errors import BindingError, ConfigError
from sharded_spd.kernels.base import FORMED
from sharded_spd.projection.layers import Key, LayerTable, Phase, RuleLayers, ScopeIndex
from sharded_spd.rules.base import Stats
from sharded_spd.rules.statistics import Statistic
from sharded_spd.sharding.collectives import Failure, raise_first, told_of
from sharded_spd.sharding.reductions import all_reduce_


class Sums:
    """The statistics `keys` of a table, preceded by rows of `flags` `[num_flags, num_layers]`."""

    def __init__(self, plan: LayerTable, keys: Sequence[Key]) -> None:
        self._plan = plan
        self._layer_keys = {key: i for i, key in enumerate(k for k in keys if k[1].per == "layer")}
        self._rows: dict[tuple[int, Key], Tensor] = {}
        for key in keys if len(self._layer_keys) < len(keys) else ():
            for layers in plan.rules if key[1].per == "row" else ():
                if key in layers.early_keys or key in layers.late_keys:
                    buffer = torch.zeros(layers.num_rows, dtype=torch.float64, device=plan.device)
                    self._rows[layers.number, key] = buffer
        self.flags = torch.empty(0)
        self._table = torch.zeros(
            len(self._layer_keys), len(plan.fqns), dtype=torch.float64, device=plan.device
        )

    def add_formed(self, phase: Phase, stats: Sequence[Statistic], columns: Tensor, rows: Tensor) -> None:
        """Add a kernel's sums: rows `[num_slices, ...]`, with the columns of `FORMED`.

        `columns` `[num_slices]` are the slices' columns in the table.
        """
        rows = rows.to(self._plan.device, non_blocking=True)
        for stat in stats:
            self._table[self._layer_keys[phase, stat]].index_add_(0, columns, rows[:, FORMED[stat]])

    def add(self, key: Key, column: int, value: Tensor) -> None:
        """Add one slice's share of a per-layer statistic, 0-d."""
        self._table[self._layer_keys[key], column] += value.to(self._plan.device)

    def rows_of(self, key: Key, layers: RuleLayers) -> Tensor:
        """The per-row sums of one rule's layers `[num_rows]`; callers add to them in place."""
        return self._rows[layers.number, key]

    def reduction(
        self,
        flags: Tensor,
        *,
        guard: Tensor | None = None,
        guarded: set[str] | None = None,
        always: bool = False,
        trouble: float = 0.0,
        checksums: Sequence[int] = (),
    ) -> Reduction:
        """Flags, statistics, rows and guard, ready to be summed over all scopes in place.

        `always`: reduce even if no rule asks for a statistic. See `Reduction`.
        """
        num_flags = flags.shape[0]
        table = torch.cat([flags, self._table])
        rows = [(p, buffer) for (p, _), buffer in self._rows.items()]
        self.flags, self._table = table[:num_flags], table[num_flags:]
        asked = always or bool(self._layer_keys or rows)
        return Reduction(self._plan, table, rows, guard, guarded or set(), asked, trouble, checksums)

    def stats(self, layers: RuleLayers, keys: Sequence[Key], earlier: Stats | None = None) -> Stats:
        """The reduced statistics of one rule's layers."""
        values: Mapping[Phase, dict[Statistic, Tensor]] = {"before": {}, "after": {}}
        for key in keys:
            phase, stat = key
            if stat.per == "row":
                values[phase][stat] = self._rows[layers.number, key]
            else:
                values[phase][stat] = self._table[self._layer_keys[key]][layers.columns]
        before = {**earlier.before, **values["before"]} if earlier is not None else values["before"]
        return Stats(before=before, after=values["after"], row_lengths=layers.row_lengths)


@dataclass(slots=True, eq=False)
class Reduction:
    """What is to be summed over the scopes of one table.

    Args:
        plan: the table that the columns and rows belong to.
        table: `[num_stats, num_layers]`.
        rows: statistics per row, each `[num_rows]` with the number of its rule.
        guard: the guard's rows `[4, num_layers]`; only scopes with a guarded layer send them.
        guarded: layers not checked yet, the same on all ranks of their scopes.
        asked: whether anything but the guard needs a sum; if not, only scopes with a guarded layer reduce.
        trouble: what this rank adds to the count of ranks in trouble: 0, `FAILED` or `ABSENT`.
        checksums: of the settings, one for each of the table's scopes; integers below 2^32.
    """

    plan: LayerTable
    table: Tensor
    rows: list[tuple[int, Tensor]]
    guard: Tensor | None
    guarded: set[str]
    asked: bool
    trouble: float = 0.0
    checksums: Sequence[int] = ()

    def views(self, scope: ScopeIndex) -> list[tuple[Tensor, Tensor]]:
        """What a scope sums: tensors `[num_rows, n]` and their columns; empty if nothing."""
        tables = [self.table]
        if self.guard is not None and not self.guarded.isdisjoint(scope.fqns):
            tables.append(self.guard)
        if not self.asked and len(tables) == 1:
            return []
        views = [(table, scope.columns) for table in tables]
        return views + [(buffer.view(1, -1), scope.rows[p]) for p, buffer in self.rows]

    @property
    def travels(self) -> bool:
        """Whether any scope has something to sum: only then do ranks meet."""
        return any(self.views(scope) for scope in self.plan.scopes)


FAILED, ABSENT = 1.0, 2.0**-20
"""What a failed rank adds, and what a rank adds that skips the step that others take; sums are exact."""


@dataclass(frozen=True, slots=True, eq=False)
class Heard:
    """What the ranks of one scope exchanged beside their sums.

    `words` `[2]`, on the device: the sum of their troubles (including those heard of in earlier scopes), and
    that of their checksums; `own` is this rank's checksum.
    """

    group: ProcessGroup
    words: Tensor
    own: int

    @property
    def trouble(self) -> Tensor:
        """The ranks in trouble, 0-d on the device; one more where settings differ."""
        return self.words[0] + (self.words[1] != self.group.size() * self.own)


def reduce_together_(reductions: Sequence[Reduction]) -> list[Heard]:
    """All-reduce every scope (modified in place): one collective each, however many tables take part."""
    heard: list[Heard] = []
    groups = {s.index: s.group for r in reductions for s in r.plan.scopes}
    for index, group in sorted(groups.items()):
        here = [(r, i, s) for r in reductions for i, s in enumerate(r.plan.scopes) if s.index == index]
        views = [view for r, _, s in here for view in r.views(s)]
        if not views:
            continue
        own = sum(r.checksums[i] for r, i, _ in here if r.checksums)
        scope = here[0][2]
        words = scope.words.update_numbers([max(r.trouble for r in reductions), float(own)])
        if heard:
            words = torch.stack([heard[-1].trouble, words[1]])
        pieces = [tensor[:, columns].reshape(-1) for tensor, columns in views]
        payload = torch.cat([*pieces, words])
        sum_over_(payload, scope)
        *summed, words = payload.split([*(p.numel() for p in pieces), words.numel()])
        for (tensor, columns), total in zip(views, summed, strict=True):
            tensor[:, columns] = total.view(tensor.shape[0], -1)
        heard.append(Heard(group, words, own))
    return heard


def sum_over_(payload: Tensor, scope: ScopeIndex) -> None:
    """Sum over the scope's ranks (modified in place)."""
    if scope.on_host:
        all_reduce_(payload, scope.group)
    else:
        dist.all_reduce(payload, group=scope.group)


class LateCopy:
    """A copy of a tensor on the host; nothing waits for it until `wait()`."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._copy = tensor.clone()

    def wait(self) -> Tensor:
        """The copy, once it has arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """The reduced numbers of one step that the guard checks.

    `rows` are the guard's rows, then gradient flags, overflow flags and learning rates:
    `[num_guard_rows + 3, num_layers]`. `wanted` are the layers with a strength.
    """

    fqns: Sequence[str]
    scopes: Sequence[Sequence[str]]
    rows: Tensor
    wanted: frozenset[str] = frozenset()


def comes_late(numbers: Tensor) -> bool:
    """Whether the host would have to wait for `numbers`."""
    return numbers.is_cuda


class Verdict:
    """What ranks reported: read at once on a CPU; on a GPU when the next step begins, without waiting.

    On a GPU, ranks only learn that a rank failed: that rank raises by itself, the others when they read.
    """

    def __init__(self, heard: Sequence[Heard], evidence: Sequence[Evidence], unverified: Unverified) -> None:
        self._heard, self._evidence, self._unverified = heard, evidence, unverified
        parts = [h.words for h in heard] + [e.rows.reshape(-1) for e in evidence]
        numbers = torch.cat([t.to(parts[0].device) for t in parts])
        self.late = comes_late(numbers)
        """Whether the numbers are still being copied to the host."""
        self._numbers: Tensor | LateCopy = LateCopy(numbers) if self.late else numbers

    def read(
        self, failure: Exception | None = None, settings: Callable[[], Mapping[str, Any]] = dict
    ) -> None:
        """Raise any reported problem, on every rank that hears of it.

        Args:
            failure: this rank's own; not raised if it means absence and all ranks are absent.
            settings: returns this rank's settings by name, to find which differ.

        Raises:
            AnchorError: a layer had left its anchor before its first step.
            ConfigError: the settings of the step differ between ranks.
            The rank's own exception; on the other ranks one of the same kind that names the failing rank.
        """
        numbers = self._numbers.wait() if isinstance(self._numbers, LateCopy) else self._numbers
        words, rest = numbers[: 2 * len(self._heard)].view(-1, 2).tolist(), numbers[2 * len(self._heard) :]
        if self._all_absent(words):
            return
        wrong = [
            heard
            for heard, (trouble, checksum) in zip(self._heard, words, strict=True)
            if trouble or checksum != heard.group.size() * heard.own
        ]
        if wrong and self.late:
            raise failure or BindingError(
                "another rank failed in the step before this one, or has other settings; see its message"
            )
        if wrong:
            _raise_together(failure, settings(), wrong)
        if failure is not None:
            raise failure
        begin = 0
        for e in self._evidence:
            rows = rest[begin : begin + e.rows.numel()].view(e.rows.shape)
            begin += e.rows.numel()
            guard, (has_grad, found_inf, lr) = rows[:NUM_ROWS], rows[NUM_ROWS:]
            check_first_steps(
                self._unverified,
                e.fqns,
                e.scopes,
                guard,
                has_grad=has_grad,
                found_inf=found_inf,
                lr=lr,
                wanted=e.wanted,
            )

    def _all_absent(self, words: Sequence[Sequence[float]]) -> bool:
        """Whether every rank is absent; each scope also counts those of the scopes before it."""
        expected = ABSENT
        for heard, (trouble, _) in zip(self._heard, words, strict=True):
            expected *= heard.group.size()
            if trouble != expected:
                return False
        return bool(self._heard)


def _raise_together(failure: Exception | None, settings: Mapping[str, Any], wrong: Sequence[Heard]) -> None:
    """Exchange what is wrong, scope by scope in the order of the reductions; the same ranks know of it."""
    failures, by_rank = told_of(failure), {dist.get_rank(): dict(settings)}
    for heard in wrong:
        gathered: list[tuple[list[Failure], dict[int, dict[str, Any]]]] = [([], {})] * heard.group.size()
        dist.all_gather_object(gathered, (failures, by_rank), group=heard.group)
        failures = sorted({entry for entries, _ in gathered for entry in entries})
        by_rank = {rank: values for _, entries in gathered for rank, values in entries.items()}
    raise_first(failure, failures)
    raise ConfigError(_difference(by_rank))


def _difference(by_rank: Mapping[int, Mapping[str, Any]]) -> str:
    (first, settings), *others = sorted(by_rank.items())
    for rank, theirs in others:
        for name, value in settings.items():
            if name in theirs and theirs[name] != value:
                return (
                    f"got {name} {value!r} on rank {first} and {theirs[name]!r} on rank {rank} in one step; "
                    "give all ranks the same settings"
                )
    return f"the settings of a step differ between ranks {sorted(by_rank)}; give all ranks the same"
