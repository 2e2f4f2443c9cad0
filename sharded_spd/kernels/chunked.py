"""Anchors that are read in chunks (from disk, or from the host's memory to a GPU), under any backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sharded_spd.kernels.base import Backend, Moments, Slice, Table
from sharded_spd.rules.statistics import CHUNK


class ChunkedKernels:
    """Another backend, one chunk at a time; the same results to the last bit. See `Backend`."""

    def __init__(self, backend: Backend) -> None:
        self.name = f"{backend.name}, chunk by chunk"
        self._backend = backend

    def takes(self, *tensors: Tensor | None) -> bool:
        """See `Backend`."""
        return self._backend.takes(*tensors)

    def table(self, slices: Sequence[Slice], last: Table | None = None) -> Table:
        """See `Backend`."""
        return _ChunkedTable(self._backend, slices)


class _ChunkedTable:
    """See `Table`. Reads at most one chunk of the anchor at a time."""

    def __init__(self, backend: Backend, slices: Sequence[Slice]) -> None:
        self._backend = backend
        self._slices = slices

    def _tables(self, s: Slice) -> Iterator[Table]:
        table: Table | None = None
        for begin in range(0, s.numel, CHUNK):
            numel = min(CHUNK, s.numel - begin)
            anchor = None if s.anchor is None else s.anchor[begin : begin + numel]
            part = Slice(s.weight, s.offset + begin, numel, anchor, s.grad, s.grad_factor)
            table = self._backend.table([part], table)
            yield table

    def sums(self, *, grads: bool) -> Tensor:
        """See `Table`."""
        out = self._zeros(2)
        for row, s in zip(out, self._slices, strict=True):
            for table in self._tables(s):
                row += table.sums(grads=grads)[0]
        return out

    def adam_(self, moments: Sequence[Moments], numbers: Tensor) -> Tensor:
        """See `Table`."""
        out = self._zeros(3)
        for i, (s, own) in enumerate(zip(self._slices, moments, strict=True)):
            for table in self._tables(s):
                out[i] += table.adam_([own], numbers[i : i + 1])[0]
        return out

    def pull_(self, s: Tensor) -> None:
        """See `Table`."""
        for i, own in enumerate(self._slices):
            if s.device.type == "cpu" and s[i] == 0:  # then nothing need be read
                continue
            for table in self._tables(own):
                table.pull_(s[i : i + 1])

    def _zeros(self, columns: int) -> Tensor:
        device = self._slices[0].weight.device if self._slices else None
        return torch.zeros(len(self._slices), columns, dtype=torch.float64, device=device)
