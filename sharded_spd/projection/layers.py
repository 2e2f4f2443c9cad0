"""What stays the same from step to step: whose columns are whose, and what is summed over whom.

A plan belongs to the layers of one inner step, in the engine's order, which is the same on all ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sharded_spd.binding.records import Binding
from sharded_spd.projection.hostvec import HostVector
from sharded_spd.rules import LayerInfo, Rule
from sharded_spd.rules.rows import row_count
from sharded_spd.rules.statistics import Statistic
from sharded_spd.sharding.layout import BoundShard, ShardSlice
from sharded_spd.sharding.reductions import all_reduce_

Phase = Literal["before", "after"]
Key = tuple[Phase, Statistic]


@dataclass(slots=True, eq=False)
class RulePart:
    """The layers of a plan that one rule governs: their columns, and their rows one after the other."""

    rule: Rule
    fqns: tuple[str, ...]
    columns: Tensor
    row_lengths: Tensor
    row_ranges: tuple[slice, ...]
    num_rows: int
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def has_row_stats(self) -> bool:
        """Whether any of its statistics is per row."""
        return any(s.per == "row" for s in (*self.rule.spec.before, *self.rule.spec.after))

    @property
    def early(self) -> bool:
        """Whether its statistics before the step are needed ahead of the base step."""
        spec = self.rule.spec
        return spec.edits_grad or (spec.when == "before" and bool(spec.before))

    def keys(self, *, early: bool) -> list[Key]:
        """The statistics to reduce ahead of the base step, or after it."""
        before: list[Key] = [("before", s) for s in self.rule.spec.before] if self.early is early else []
        after: list[Key] = [] if early else [("after", s) for s in self.rule.spec.after]
        return before + after


@dataclass(slots=True)
class ScopeIndex:
    """A scope's layers and columns of the plan, and its rows of each rule part; `index` among all scopes."""

    index: int
    group: ProcessGroup
    fqns: tuple[str, ...]
    columns: Tensor
    rows: list[Tensor]


class Plan:
    """Columns, rows and scopes of the layers that step together."""

    def __init__(self, fqns: Sequence[str], binding: Binding, device: torch.device) -> None:
        self.fqns = tuple(fqns)
        self.device = device
        self.column = {fqn: i for i, fqn in enumerate(self.fqns)}
        self.parts = self._make_parts(binding)
        self.part_of = {fqn: (part, i) for part in self.parts for i, fqn in enumerate(part.fqns)}
        self.scopes = self._make_scopes(binding)
        self.vectors: defaultdict[str, HostVector] = defaultdict(lambda: HostVector(device))
        self.pieces: dict[str, ShardSlice] = {}
        self.shard_states: dict[str, dict[str, Tensor]] = {}
        self.reports: dict[int, dict[str, Tensor]] = {}
        self.frozen: set[str] = set()
        """Layers that were frozen, and without a gradient, in the last step."""

    def _make_parts(self, binding: Binding) -> list[RulePart]:
        by_rule: dict[int, tuple[Rule, list[str]]] = {}
        for fqn in self.fqns:
            rule = binding.options[fqn].rule
            by_rule.setdefault(id(rule), (rule, []))[1].append(fqn)
        parts = []
        for rule, fqns in by_rule.values():
            shapes = [binding.layout.shapes[fqn] for fqn in fqns]
            lengths = [row_count(shape) for shape in shapes]
            ends = list(accumulate(lengths))
            ranges = tuple(slice(end - n, end) for end, n in zip(ends, lengths, strict=True))
            columns = torch.tensor([self.column[fqn] for fqn in fqns], device=self.device)
            row_lengths = torch.tensor(lengths, device=self.device)
            part = RulePart(rule, tuple(fqns), columns, row_lengths, ranges, ends[-1])
            infos = [
                LayerInfo(fqn, shape, binding.layout.order) for fqn, shape in zip(fqns, shapes, strict=True)
            ]
            part.state = {name: t.to(self.device, copy=True) for name, t in rule.prepare(infos).items()}
            parts.append(part)
        return parts

    def _make_scopes(self, binding: Binding) -> list[ScopeIndex]:
        scopes = []
        for index, scope in enumerate(binding.layout.scopes):
            members = set(scope.layers)
            columns = [i for i, fqn in enumerate(self.fqns) if fqn in members]
            if not columns:
                continue
            rows = []
            for part in self.parts:
                own = [
                    torch.arange(rows_of.start, rows_of.stop)
                    for fqn, rows_of in zip(part.fqns, part.row_ranges, strict=True)
                    if fqn in members
                ]
                rows.append((torch.cat(own) if own else torch.empty(0, dtype=torch.long)).to(self.device))
            fqns = tuple(self.fqns[i] for i in columns)
            where = torch.tensor(columns, device=self.device)
            scopes.append(ScopeIndex(index, scope.group, fqns, where, rows))
        return scopes

    def prepare_shard_states(self, binding: Binding, shards: Sequence[BoundShard]) -> None:
        """Make the rules' state of every slice, `[piece.numel]` each, zero at first; at least float32."""
        for shard in shards:
            for piece in shard.slices:
                self.pieces[piece.layer] = piece
                names = binding.options[piece.layer].rule.spec.shard_state
                dtype = torch.promote_types(shard.tensor.dtype, torch.float32)
                if names:
                    zeros = [torch.zeros(piece.numel, dtype=dtype, device=shard.tensor.device) for _ in names]
                    self.shard_states[piece.layer] = dict(zip(names, zeros, strict=True))

    def report(self, part: RulePart, s: Tensor, extra: dict[str, Tensor]) -> None:
        """Keep what this step found for a part's layers, on the device."""
        self.reports[self.parts.index(part)] = {"s": s, **extra}

    def keys(self, *, early: bool) -> list[Key]:
        """The statistics of all parts for one reduction, each once."""
        return list(dict.fromkeys(key for part in self.parts for key in part.keys(early=early)))


@dataclass(slots=True, eq=False)
class Reduction:
    """What is to be summed over the scopes of one plan.

    Args:
        plan: whose columns and rows they are.
        table: `[num_stats, num_layers]`.
        rows: statistics per row, each `[num_rows]` with the index of its part.
        guard: the guard's rows `[4, num_layers]`; only scopes with a guarded layer send them.
        guarded: layers that are still to be checked, the same on all ranks of their scopes.
        asked: whether anything asks for more than the guard; else only scopes with a guarded layer reduce.
        trouble: what this rank adds to the ranks in trouble: 0, `FAILED` or `ABSENT`.
        checksums: of the settings of each of the plan's scopes, whole numbers below 2^32.
    """

    plan: Plan
    table: Tensor
    rows: list[tuple[int, Tensor]]
    guard: Tensor | None
    guarded: set[str]
    asked: bool
    trouble: float = 0.0
    checksums: Sequence[int] = ()

    def views(self, scope: ScopeIndex) -> list[tuple[Tensor, Tensor]]:
        """What a scope sums of it: tensors `[num_rows, n]` and the columns of them; empty where nothing."""
        tables = [self.table]
        if self.guard is not None and not self.guarded.isdisjoint(scope.fqns):
            tables.append(self.guard)
        if not self.asked and len(tables) == 1:
            return []
        views = [(table, scope.columns) for table in tables]
        return views + [(buffer.view(1, -1), scope.rows[p]) for p, buffer in self.rows]

    @property
    def travels(self) -> bool:
        """Whether any scope sums anything of it: the ranks then meet."""
        return any(self.views(scope) for scope in self.plan.scopes)


FAILED, ABSENT = 1.0, 2.0**-20
"""What a rank adds that failed, and one that does not take the step that the others take; exact sums."""


@dataclass(frozen=True, slots=True, eq=False)
class Heard:
    """What the ranks of one scope told each other beside their sums.

    `words` `[2]`, on the device, is the sum of their troubles (and of those that they have heard of in scopes
    before this one) and of their checksums, of which this rank's is `own`.
    """

    group: ProcessGroup
    words: Tensor
    own: int

    @property
    def trouble(self) -> Tensor:
        """The ranks in trouble, 0-d on the device; one more where settings differ."""
        return self.words[0] + (self.words[1] != self.group.size() * self.own)


def reduce_together_(reductions: Sequence[Reduction]) -> list[Heard]:
    """Sum over every scope (modified in place), one collective each, however many plans take part."""
    heard: list[Heard] = []
    groups = {s.index: s.group for r in reductions for s in r.plan.scopes}
    for index, group in sorted(groups.items()):
        here = [(r, i, s) for r in reductions for i, s in enumerate(r.plan.scopes) if s.index == index]
        views = [view for r, _, s in here for view in r.views(s)]
        if not views:
            continue
        own = sum(r.checksums[i] for r, i, _ in here if r.checksums)
        vectors = reductions[0].plan.vectors
        words = vectors[f"words {index}"].update_numbers([max(r.trouble for r in reductions), float(own)])
        if heard:
            words = torch.stack([heard[-1].trouble, words[1]])
        pieces = [tensor[:, columns].reshape(-1) for tensor, columns in views]
        payload = torch.cat([*pieces, words])
        all_reduce_(payload, group)
        *summed, words = payload.split([*(p.numel() for p in pieces), words.numel()])
        for (tensor, columns), part in zip(views, summed, strict=True):
            tensor[:, columns] = part.view(tensor.shape[0], -1)
        heard.append(Heard(group, words, own))
    return heard
