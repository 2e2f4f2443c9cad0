"""Forming the statistics of one inner step: local sums slice by slice, then one reduction per scope."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharded_spd.anchors.base import Values
from sharded_spd.anchors.mapped import MappedValues
from sharded_spd.binding import flat
from sharded_spd.kernels.cpu import Slice, can_sum, sums
from sharded_spd.layout import BoundShard, ShardSlice
from sharded_spd.plan import Key, Phase, Plan, Reduction, RulePart
from sharded_spd.rules import RuleSpec, Stats
from sharded_spd.stats import (
    CHUNK,
    DELTA_SQ,
    GRAD_DOT_DELTA,
    Block,
    RowSpan,
    Statistic,
    add_row_sums_,
    layer_sums,
)


@dataclass(slots=True)
class Item:
    """One slice that steps: its tensors (1-D) and where it stands in the plan and in its rule's part.

    `position` is that of its shard among the step's.
    """

    position: int
    shard: BoundShard
    piece: ShardSlice
    part: RulePart
    index: int
    column: int
    grad_factor: float | Tensor
    anchor: Values | None
    spans: list[RowSpan]
    state: dict[str, Tensor]
    kept: Tensor | None = None

    @property
    def cut(self) -> slice:
        """Where the slice lies in its flattened tensor."""
        return slice(self.piece.offset, self.piece.offset + self.piece.numel)

    def blocks(self, *, grads: bool) -> Iterator[tuple[slice, Block]]:
        """The slice in chunks, as the tensors are now."""
        weight = flat(self.shard.tensor)[self.cut]
        grad = flat(self.shard.grad)[self.cut] if grads and self.shard.grad is not None else None
        for begin in range(0, weight.numel(), CHUNK):
            cut = slice(begin, min(begin + CHUNK, weight.numel()))
            yield (
                cut,
                Block(
                    weight=weight[cut],
                    anchor=None if self.anchor is None else self.anchor[cut],
                    raw_grad=None if grad is None else grad[cut],
                    grad_factor=self.grad_factor,
                    kept=None if self.kept is None else self.kept[cut],
                    state={name: t[cut] for name, t in self.state.items()},
                ),
            )


_COMPILED = {GRAD_DOT_DELTA: 0, DELTA_SQ: 1}
"""The statistics that the compiled kernels form, and where in a row of theirs."""


def can_fuse(spec: RuleSpec) -> bool:
    """Whether a kernel that steps the weights forms all the sums that a rule wants."""
    return all(stat in _COMPILED for stat in spec.before) and set(spec.after) <= {DELTA_SQ}


def _as_slice(item: Item, wanted: Sequence[Statistic]) -> Slice | None:
    """The slice for the compiled kernels; None where the reference path has to do it."""
    grad = item.shard.grad
    if any(stat not in _COMPILED for stat in wanted) or (GRAD_DOT_DELTA in wanted and grad is None):
        return None
    weight = flat(item.shard.tensor)[item.cut]
    grad = flat(grad)[item.cut] if grad is not None and GRAD_DOT_DELTA in wanted else None
    anchor = None if isinstance(item.anchor, MappedValues) else item.anchor
    if (anchor is not None and not isinstance(anchor, Tensor)) or not can_sum(weight, grad, anchor):
        return None
    factor = item.grad_factor.item() if isinstance(item.grad_factor, Tensor) else item.grad_factor
    return Slice(weight, anchor, grad, factor)


def _sums_of_mapped(whole: Slice, anchor: MappedValues) -> Tensor:
    """The same sums to the last bit, while no more than a chunk of the anchor is in memory."""
    total = torch.zeros(2, dtype=torch.float64)
    for begin in range(0, whole.weight.numel(), CHUNK):
        cut = slice(begin, min(begin + CHUNK, whole.weight.numel()))
        grad = None if whole.grad is None else whole.grad[cut]
        total += sums([Slice(whole.weight[cut], anchor[cut], grad, whole.grad_factor)])[0]
    return total


class Sums:
    """The statistics `keys` of a plan, preceded by rows of `flags` `[num_flags, num_layers]`."""

    def __init__(self, plan: Plan, keys: Sequence[Key]) -> None:
        self._plan = plan
        self._layer_keys = [k for k in keys if k[1].per == "layer"]
        self._cells: dict[tuple[Key, int], Tensor] = {}
        self._rows: dict[tuple[int, Key], Tensor] = {}
        for p, part in enumerate(plan.parts):
            for key in part.keys(early=True) + part.keys(early=False):
                if key in keys and key[1].per == "row":
                    self._rows[p, key] = torch.zeros(part.num_rows, dtype=torch.float64, device=plan.device)
        self.flags = torch.empty(0)
        self._table = torch.empty(0)

    def add_all(self, phase: Phase, wanted: Sequence[tuple[Item, Sequence[Statistic]]]) -> None:
        """Add the parts of many slices, each with the statistics that are wanted of it."""
        compiled: list[tuple[Item, Sequence[Statistic]]] = []
        slices: list[Slice] = []
        for item, statistics in wanted:
            own = _as_slice(item, statistics)
            if own is None:
                self.add(phase, item, statistics)
            elif isinstance(item.anchor, MappedValues):
                self._add_row(phase, item, statistics, _sums_of_mapped(own, item.anchor))
            else:
                compiled.append((item, statistics))
                slices.append(own)
        if slices:
            for (item, statistics), row in zip(compiled, sums(slices), strict=True):
                self._add_row(phase, item, statistics, row)

    def add_fused(self, items: Sequence[Item], rows: Tensor) -> None:
        """Add rows `[num_items, 3]` of <g, d>, |d|^2 and, after the base step, |d|^2."""
        for item, row in zip(items, rows, strict=True):
            spec = item.part.rule.spec
            self._add_row("before", item, spec.before, row)
            for stat in spec.after:
                self._add_cell((("after", stat), item.column), row[2])

    def _add_row(self, phase: Phase, item: Item, wanted: Sequence[Statistic], row: Tensor) -> None:
        for stat in wanted:
            self._add_cell(((phase, stat), item.column), row[_COMPILED[stat]])

    def _add_cell(self, cell: tuple[Key, int], value: Tensor) -> None:
        value = value.to(self._plan.device)
        self._cells[cell] = self._cells[cell] + value if cell in self._cells else value

    def add(self, phase: Phase, item: Item, wanted: Sequence[Statistic]) -> None:
        """Add one slice's part of the statistics `wanted`, by the reference path."""
        per_layer = tuple(s for s in wanted if s.per == "layer")
        per_row = [s for s in wanted if s.per == "row"]

        def blocks() -> Iterator[Block]:
            for cut, block in item.blocks(grads=phase == "before"):
                for stat in per_row:
                    rows = self._rows[self._plan.parts.index(item.part), (phase, stat)]
                    add_row_sums_(
                        rows[item.part.row_ranges[item.index]], stat.term(block), item.spans, cut.start
                    )
                yield block

        for stat, value in zip(per_layer, layer_sums(blocks(), per_layer), strict=True):
            self._add_cell(((phase, stat), item.column), value)

    def reduction(
        self,
        flags: Tensor,
        *,
        guard: Tensor | None = None,
        guarded: set[str] | None = None,
        always: bool = False,
    ) -> Reduction:
        """Flags, statistics, rows and guard, ready to be summed over all scopes in place.

        `always`: the flags are wanted even where no rule asks for a statistic.
        """
        plan, num_flags = self._plan, flags.shape[0]
        zero = torch.zeros((), dtype=torch.float64, device=plan.device)
        cells = [self._cells.get((key, i), zero) for key in self._layer_keys for i in range(len(plan.fqns))]
        sums = torch.stack(cells).view(-1, len(plan.fqns)) if cells else flags[:0]
        table = torch.cat([flags, sums])
        rows = [(p, buffer) for (p, _), buffer in self._rows.items()]
        self.flags, self._table = table[:num_flags], table[num_flags:]
        return Reduction(plan, table, rows, guard, guarded or set(), asked=always or bool(cells or rows))

    def row(self, key: Key) -> Tensor:
        """A reduced statistic per layer of the plan, `[num_layers]`."""
        return self._table[self._layer_keys.index(key)]

    def stats(self, part: RulePart, keys: Sequence[Key], earlier: Stats | None = None) -> Stats:
        """The reduced statistics of one rule's layers."""
        values: Mapping[Phase, dict[Statistic, Tensor]] = {"before": {}, "after": {}}
        for key in keys:
            phase, stat = key
            if stat.per == "row":
                values[phase][stat] = self._rows[self._plan.parts.index(part), key]
            else:
                values[phase][stat] = self.row(key)[part.columns]
        before = {**earlier.before, **values["before"]} if earlier is not None else values["before"]
        return Stats(before=before, after=values["after"], row_lengths=part.row_lengths)
