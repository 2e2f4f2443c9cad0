"""What stays the same from step to step: each layer's column, and the scopes over which columns are summed.

A table covers the layers of one inner step, in the engine's order, which is the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sharded_spd.binding.records import Binding
from sharded_spd.projection.hyperparams import HostVector
from sharded_spd.rules.base import LayerInfo, Rule
from sharded_spd.rules.rows import row_count
from sharded_spd.rules.statistics import Statistic
from sharded_spd.sharding.layout import BoundShard, ShardSlice
from sharded_spd.sharding.reductions import needs_device

Phase = Literal["before", "after"]
Key = tuple[Phase, Statistic]


@dataclass(slots=True, eq=False)
class RuleLayers:
    """The layers of a table that share one rule: their columns, and their rows, concatenated.

    `number` is its index in the table. `early`: its `before` statistics are needed ahead of the base step;
    `early_keys` are reduced there, `late_keys` after the base step.
    """

    number: int
    rule: Rule
    fqns: tuple[str, ...]
    columns: Tensor
    row_lengths: Tensor
    row_ranges: tuple[slice, ...]
    num_rows: int
    state: dict[str, Tensor] = field(default_factory=dict)
    early: bool = field(init=False)
    early_keys: list[Key] = field(init=False)
    late_keys: list[Key] = field(init=False)

    def __post_init__(self) -> None:
        """Split the rule's statistics into early and late keys."""
        spec = self.rule.spec
        self.early = spec.edits_grad or (spec.when == "before" and bool(spec.before))
        before: list[Key] = [("before", s) for s in spec.before]
        after: list[Key] = [("after", s) for s in spec.after]
        self.early_keys = before if self.early else []
        self.late_keys = after if self.early else before + after

    @property
    def has_row_stats(self) -> bool:
        """Whether any statistic is per row."""
        return any(s.per == "row" for s in (*self.rule.spec.before, *self.rule.spec.after))


@dataclass(slots=True)
class ScopeIndex:
    """A scope's layers and columns in the table, and its rows of each rule; `index` counts all scopes.

    `words`: what this rank sends beside the sums. `on_host`: the sums must be copied to the device that the
    group works on.
    """

    index: int
    group: ProcessGroup
    fqns: tuple[str, ...]
    columns: Tensor
    rows: list[Tensor]
    words: HostVector
    on_host: bool


class LayerTable:
    """Columns, rows and scopes of the layers that step together."""

    def __init__(self, fqns: Sequence[str], binding: Binding, device: torch.device) -> None:
        self.fqns = tuple(fqns)
        self.device = device
        self.column = {fqn: i for i, fqn in enumerate(self.fqns)}
        self.rules = self._make_rules(binding)
        self.layers_of = {fqn: (rule, i) for rule in self.rules for i, fqn in enumerate(rule.fqns)}
        self.scopes = self._make_scopes(binding)
        self.early_keys = list(dict.fromkeys(key for rule in self.rules for key in rule.early_keys))
        self.late_keys = list(dict.fromkeys(key for rule in self.rules for key in rule.late_keys))
        self.early = any(rule.early for rule in self.rules)
        """Whether sums are reduced ahead of the base step."""
        self.pieces: dict[str, ShardSlice] = {}
        self.shard_states: dict[str, dict[str, Tensor]] = {}
        self.reports: dict[int, dict[str, Tensor]] = {}
        """What each rule reported for its layers in the last step, on the device; by the rule's number."""
        self.frozen: set[str] = set()
        """Layers that were frozen and had no gradient in the last step."""

    def _make_rules(self, binding: Binding) -> list[RuleLayers]:
        by_rule: dict[int, tuple[Rule, list[str]]] = {}
        for fqn in self.fqns:
            rule = binding.options[fqn].rule
            by_rule.setdefault(id(rule), (rule, []))[1].append(fqn)
        rule_layers: list[RuleLayers] = []
        for rule, fqns in by_rule.values():
            shapes = [binding.layout.shapes[fqn] for fqn in fqns]
            lengths = [row_count(shape) for shape in shapes]
            ends = list(accumulate(lengths))
            ranges = tuple(slice(end - n, end) for end, n in zip(ends, lengths, strict=True))
            columns = torch.tensor([self.column[fqn] for fqn in fqns], device=self.device)
            row_lengths = torch.tensor(lengths, device=self.device)
            infos = [
                LayerInfo(fqn, shape, binding.layout.order) for fqn, shape in zip(fqns, shapes, strict=True)
            ]
            state = {name: t.to(self.device, copy=True) for name, t in rule.prepare(infos).items()}
            rule_layers.append(
                RuleLayers(len(rule_layers), rule, tuple(fqns), columns, row_lengths, ranges, ends[-1], state)
            )
        return rule_layers

    def _make_scopes(self, binding: Binding) -> list[ScopeIndex]:
        scopes = []
        for index, scope in enumerate(binding.layout.scopes):
            members = set(scope.layers)
            columns = [i for i, fqn in enumerate(self.fqns) if fqn in members]
            if not columns:
                continue
            rows = []
            for rule in self.rules:
                inside = [
                    torch.arange(rows_of.start, rows_of.stop)
                    for fqn, rows_of in zip(rule.fqns, rule.row_ranges, strict=True)
                    if fqn in members
                ]
                rows.append(
                    (torch.cat(inside) if inside else torch.empty(0, dtype=torch.long)).to(self.device)
                )
            fqns = tuple(self.fqns[i] for i in columns)
            where = torch.tensor(columns, device=self.device)
            on_host = self.device.type == "cpu" and needs_device(scope.group)
            words = HostVector(self.device)
            scopes.append(ScopeIndex(index, scope.group, fqns, where, rows, words, on_host))
        return scopes

    def prepare_shard_states(self, binding: Binding, shards: Sequence[BoundShard]) -> None:
        """Allocate every slice's rule state: zeros `[piece.numel]`, at least float32."""
        for shard in shards:
            for piece in shard.slices:
                self.pieces[piece.layer] = piece
                names = binding.options[piece.layer].rule.spec.shard_state
                dtype = torch.promote_types(shard.tensor.dtype, torch.float32)
                if names:
                    zeros = [torch.zeros(piece.numel, dtype=dtype, device=shard.tensor.device) for _ in names]
                    self.shard_states[piece.layer] = dict(zip(names, zeros, strict=True))
