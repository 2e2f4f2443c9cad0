"""Slices that are worked on together: those of one rule and one device, in one call of its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharded_spd.kernels import FORMED, Backend, Moments, Table
from sharded_spd.projection.hostvec import HostVector
from sharded_spd.projection.items import Item
from sharded_spd.projection.layers import Phase, RulePart
from sharded_spd.projection.sums import Sums


@dataclass(slots=True)
class Kept:
    """What a batch leaves to that of the next step."""

    columns: HostVector
    index: HostVector
    table: Table | None = None


class Batch:
    """Items of one rule that one backend takes, for one step. Their gradients are there when it is made."""

    def __init__(self, items: list[Item], backend: Backend, kept: Kept) -> None:
        self.items = items
        self._backend = backend
        self._kept = kept
        self._columns = kept.columns.update_numbers([item.column for item in items])
        self._make_table()

    def _make_table(self) -> None:
        self._places = self._weights()
        slices = [item.tensors for item in self.items]
        self._table = self._kept.table = self._backend.table(slices, self._kept.table)

    def _weights(self) -> list[int]:
        return [item.tensors.weight.data_ptr() for item in self.items]

    @property
    def part(self) -> RulePart:
        """The rule's part of the plan."""
        return self.items[0].part

    def add(self, phase: Phase, sums: Sums) -> None:
        """Add the statistics of its rule: those that kernels form, or all of them in plain torch."""
        wanted = self.part.rule.spec.before if phase == "before" else self.part.rule.spec.after
        if any(stat not in FORMED for stat in wanted):
            for item in self.items:
                sums.add(phase, item, wanted)
        elif wanted:
            self._find_weights()
            sums.add_formed(phase, wanted, self._columns, self._table.sums(grads=phase == "before"))

    def adam_(self, moments: Sequence[Moments], numbers: Tensor, sums: Sums) -> None:
        """Step the items as Adam does (modified in place), and add the statistics before and after it."""
        rows = self._table.adam_(moments, numbers)
        sums.add_formed("before", self.part.rule.spec.before, self._columns, rows)
        # Of the last two columns the second is |d|^2 after the step, as in a row of sums.
        sums.add_formed("after", self.part.rule.spec.after, self._columns, rows[:, 1:])
        for item in self.items:
            item.write_back()

    def pull_(self, s: Tensor) -> None:
        """Pull the items (modified in place) by `s`, float64 `[num_layers]` of their rule."""
        self._find_weights()
        index = self._kept.index.update_numbers([item.index for item in self.items])
        self._table.pull_(s.index_select(0, index).to(self.items[0].tensors.weight.device, non_blocking=True))
        for item in self.items:
            item.write_back()

    def _find_weights(self) -> None:
        """A base optimizer may have put new tensors in place."""
        if self._weights() != self._places:
            self._make_table()


class Batches:
    """Sorts items into batches; kept from step to step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[tuple[int, str, str, torch.device], Kept] = {}

    def of(self, items: Sequence[Item], purpose: str) -> list[Batch]:
        """The batches of `items`; those of one `purpose` are most like those of the step before."""
        found: dict[tuple[int, str, str, torch.device], tuple[Backend, list[Item]]] = {}
        last: tuple[RulePart, Backend, torch.device] | None = None
        own: list[Item] = []
        for item in items:
            part, backend, device = now = (item.part, item.backend, item.tensors.weight.device)
            if now != last:
                last, key = now, (id(part), purpose, backend.name, device)
                _, own = found.setdefault(key, (backend, []))
            own.append(item)
        batches = []
        for key, (backend, own) in found.items():
            if key not in self._kept:
                columns, index = (HostVector(self._device, torch.long) for _ in range(2))
                self._kept[key] = Kept(columns, index)
            batches.append(Batch(own, backend, self._kept[key]))
        return batches
