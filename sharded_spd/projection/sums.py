"""Forming the statistics of one inner step: local sums slice by slice, then one reduction per scope."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sharded_spd.kernels import FORMED
from sharded_spd.projection.items import Item
from sharded_spd.projection.layers import Key, Phase, Plan, Reduction, RulePart
from sharded_spd.rules import Stats
from sharded_spd.rules.rows import add_row_sums_
from sharded_spd.rules.statistics import Block, Statistic, layer_sums


class Sums:
    """The statistics `keys` of a plan, preceded by rows of `flags` `[num_flags, num_layers]`."""

    def __init__(self, plan: Plan, keys: Sequence[Key]) -> None:
        self._plan = plan
        self._layer_keys = {key: i for i, key in enumerate(k for k in keys if k[1].per == "layer")}
        self._rows: dict[tuple[int, Key], Tensor] = {}
        for p, part in enumerate(plan.parts):
            for key in part.keys(early=True) + part.keys(early=False):
                if key in keys and key[1].per == "row":
                    self._rows[p, key] = torch.zeros(part.num_rows, dtype=torch.float64, device=plan.device)
        self.flags = torch.empty(0)
        self._table = torch.zeros(
            len(self._layer_keys), len(plan.fqns), dtype=torch.float64, device=plan.device
        )

    def add_formed(self, phase: Phase, wanted: Sequence[Statistic], columns: Tensor, rows: Tensor) -> None:
        """Add what a kernel has formed: rows `[num_items, ...]` whose columns are as `FORMED` says.

        `columns` `[num_items]` are the items' in the plan.
        """
        rows = rows.to(self._plan.device, non_blocking=True)
        for stat in wanted:
            self._table[self._layer_keys[phase, stat]].index_add_(0, columns, rows[:, FORMED[stat]])

    def add(self, phase: Phase, item: Item, wanted: Sequence[Statistic]) -> None:
        """Add one slice's part of the statistics `wanted`, in plain torch."""
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
            self._table[self._layer_keys[phase, stat], item.column] += value.to(self._plan.device)

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

        `always`: the ranks are to meet even where no rule asks for a statistic. See `Reduction`.
        """
        plan, num_flags = self._plan, flags.shape[0]
        table = torch.cat([flags, self._table])
        rows = [(p, buffer) for (p, _), buffer in self._rows.items()]
        self.flags, self._table = table[:num_flags], table[num_flags:]
        asked = always or bool(self._layer_keys or rows)
        return Reduction(plan, table, rows, guard, guarded or set(), asked, trouble, checksums)

    def row(self, key: Key) -> Tensor:
        """A reduced statistic per layer of the plan, `[num_layers]`."""
        return self._table[self._layer_keys[key]]

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
