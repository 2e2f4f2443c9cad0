"""Triton's kernels on slices in a GPU's memory: one launch for all that are alike in their dtypes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from sharded_spd.kernels.base import Moments, Slice, Table
from sharded_spd.kernels.triton_kernels import (
    CHUNK,
    adam_kernel,
    add_up_kernel,
    pull_kernel,
    sums_kernel,
)

_KINDS = {torch.float32: 1, torch.float64: 2, torch.bfloat16: 3, torch.float16: 4}
_TYPES = (None, tl.float32, tl.float64, tl.bfloat16, tl.float16)
_ROW = struct.Struct("=4qd2q")
_MOMENTS_ROW = struct.Struct("=4q")
_ANCHOR, _GRAD, _FACTOR, _STATE = 4, 8, 12, 16
"""Where in a slice's kinds each dtype's number stands, of 4 bits; the weight's at 0."""
_ALIGNED, _AMSGRAD = 1 << 20, 1 << 21
_NO_GRADS = ~(15 << _GRAD | 15 << _FACTOR)
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
_CAPTURED: set[_Numbers] = set()
"""Tables that CUDA graphs read at every replay; nothing tells when a graph is gone."""


class TritonKernels:
    """For tensors on a GPU; in Triton's interpreter for those in host memory. See `Backend`."""

    name = "triton"

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type

    def takes(self, *tensors: Tensor | None) -> bool:
        """See `Backend`."""
        device = None
        for t in tensors:
            if t is None:
                continue
            device = t.device if device is None else device
            if not (
                t.dtype in _KINDS
                and t.device == device
                and device.type == self._device_type
                and t.is_contiguous()
                and (type(t) is Tensor or type(t) is torch.nn.Parameter)
            ):
                return False
        return True

    def table(self, slices: Sequence[Slice], last: Table | None = None) -> Table:
        """See `Backend`."""
        return TritonTable(slices, last if isinstance(last, TritonTable) else None)


class _Numbers:
    """64-bit numbers made on the host, on the device; uploaded without waiting."""

    def __init__(self, host: Tensor, device: torch.device) -> None:
        # Kept: a graph that captures the upload reads the host's memory at every replay.
        self._host: Tensor = host.pin_memory() if device.type == "cuda" else host
        self.values: Tensor = self._host.to(device, non_blocking=True)


class _Rows:
    """Rows of addresses, uploaded where they are not the last ones."""

    def __init__(self, rows: bytes, device: torch.device, last: _Rows | None) -> None:
        self.host = rows
        self.is_last = last is not None and last.host == rows and last.numbers.values.device == device
        self.numbers: _Numbers
        if last is not None and self.is_last:
            self.numbers = last.numbers
        else:
            # A table of no slices has an address all the same.
            self.numbers = _Numbers(torch.frombuffer(bytearray(rows or 8), dtype=torch.int64), device)


class _Plan:
    """The chunks of slices, those of like kinds side by side: one launch for each `(kinds, first, count)`."""

    def __init__(self, kinds: Sequence[int], numels: Sequence[int], device: torch.device) -> None:
        self._made_of = (tuple(kinds), tuple(numels), device)
        alike: dict[int, list[int]] = {}
        for i, kind in enumerate(kinds):
            alike.setdefault(kind, []).append(i)
        first, counts = [0] * len(numels), [-(-n // CHUNK) for n in numels]
        self.launches: list[tuple[int, int, int]] = []
        self.num_chunks = 0
        for kind, members in alike.items():
            begin = self.num_chunks
            for i in members:
                first[i] = self.num_chunks
                self.num_chunks += counts[i]
            if self.num_chunks > begin:
                self.launches.append((kind, begin, self.num_chunks - begin))
        order = torch.tensor([i for members in alike.values() for i in members], dtype=torch.int64)
        per_slice = torch.tensor(counts, dtype=torch.int64)
        owner = torch.repeat_interleave(order, per_slice[order])
        self.numbers = _Numbers(torch.cat([torch.tensor(first, dtype=torch.int64), per_slice, owner]), device)

    def fits(self, kinds: Sequence[int], numels: Sequence[int], device: torch.device) -> bool:
        """Whether it is the plan of such slices."""
        return self._made_of == (tuple(kinds), tuple(numels), device)


class TritonTable:
    """Addresses of slices, on the device; see `Table`.

    With the addresses of the step before nothing is uploaded; so a captured step needs one like it before.
    """

    def __init__(self, slices: Sequence[Slice], last: TritonTable | None) -> None:
        self._slices = slices
        self._numels = [s.numel for s in slices]
        self._device = slices[0].weight.device if slices else torch.device("cpu")
        self._moments: _Rows | None = None if last is None else last._moments
        self._adam_plan: _Plan | None = None if last is None else last._adam_plan
        self._plan: _Plan
        rows, self._kinds = _pack(slices)
        self._rows: _Rows = _Rows(rows, self._device, None if last is None else last._rows)
        if last is not None and (
            self._rows.is_last or last._plan.fits(self._kinds, self._numels, self._device)
        ):
            self._plan = last._plan
        else:
            self._plan = _Plan(self._kinds, self._numels, self._device)

    def sums(self, *, grads: bool) -> Tensor:
        """See `Table`."""
        partial = self._partial(self._plan, 2)
        with self._launching(self._plan.numbers):
            for kinds, first, count in self._plan.launches:
                self._sum(self._plan, partial, kinds if grads else kinds & _NO_GRADS, first, count)
            return self._add_up(self._plan, partial)

    def adam_(self, moments: Sequence[Moments], numbers: Tensor) -> Tensor:
        """See `Table`."""
        rows, all_kinds = _pack_moments(self._slices, moments, self._kinds)
        self._moments = _Rows(rows, self._device, self._moments)
        plan = self._adam_plan
        if plan is None or not plan.fits(all_kinds, self._numels, self._device):
            plan = self._adam_plan = _Plan(all_kinds, self._numels, self._device)
        numbers = numbers.contiguous()
        partial = self._partial(plan, 3)
        with self._launching(plan.numbers, self._moments.numbers):
            for kinds, first, count in plan.launches:
                if not kinds >> _GRAD & 15:
                    self._sum(plan, partial, kinds, first, count)
                    continue
                adam_kernel[(count,)](
                    self._rows.numbers.values, self._moments.numbers.values, numbers,
                    plan.numbers.values, partial, len(self._slices), first,
                    W=_type(kinds), A=_type(kinds >> _ANCHOR), G=_type(kinds >> _GRAD),
                    F=_type(kinds >> _FACTOR), M=_type(kinds >> _STATE), AMSGRAD=bool(kinds & _AMSGRAD),
                    ALIGNED=bool(kinds & _ALIGNED), **_OPTIONS,
                )  # fmt: skip
            pairs = zip(self._slices, moments, strict=True)
            increment_version([t for s, m in pairs for t in (s.weight, *m.tensors) if t is not None])
            return self._add_up(plan, partial)

    def pull_(self, s: Tensor) -> None:
        """See `Table`."""
        s = s.contiguous()
        with self._launching(self._plan.numbers):
            for kinds, first, count in self._plan.launches:
                pull_kernel[(count,)](
                    self._rows.numbers.values, s, self._plan.numbers.values, len(self._slices), first,
                    W=_type(kinds), A=_type(kinds >> _ANCHOR), ALIGNED=bool(kinds & _ALIGNED), **_OPTIONS,
                )  # fmt: skip
        increment_version([own.weight for own in self._slices])

    def _launching(self, *read: _Numbers) -> AbstractContextManager[None]:
        """Launches inside go to the slices' device."""
        if self._device.type != "cuda":
            return nullcontext()
        if torch.cuda.is_current_stream_capturing():
            _CAPTURED.update(read, [self._rows.numbers])
        return torch.cuda.device(self._device)

    def _partial(self, plan: _Plan, columns: int) -> Tensor:
        return torch.empty(max(plan.num_chunks, 1), columns, dtype=torch.float64, device=self._device)

    def _sum(self, plan: _Plan, partial: Tensor, kinds: int, first: int, count: int) -> None:
        sums_kernel[(count,)](
            self._rows.numbers.values, plan.numbers.values, partial, len(self._slices), first,
            W=_type(kinds), A=_type(kinds >> _ANCHOR), G=_type(kinds >> _GRAD), F=_type(kinds >> _FACTOR),
            ALIGNED=bool(kinds & _ALIGNED), COLUMNS=partial.shape[1], **_OPTIONS,
        )  # fmt: skip

    def _add_up(self, plan: _Plan, partial: Tensor) -> Tensor:
        num, columns = len(self._slices), partial.shape[1]
        out = torch.empty(num, columns, dtype=torch.float64, device=self._device)
        if num:
            add_up_kernel[(num, columns)](
                plan.numbers.values, partial, out, num, COLUMNS=columns, num_warps=1, enable_fp_fusion=False
            )
        return out


def _type(kinds: int) -> Any:
    return _TYPES[kinds & 15]


def _pack(slices: Sequence[Slice]) -> tuple[bytes, list[int]]:
    """Rows as the kernels read them, and each slice's kinds."""
    rows, pack, number = [], _ROW.pack, _KINDS
    all_kinds: list[int] = []
    for s in slices:
        weight, anchor, grad, factor = s.weight, s.anchor, s.grad, s.grad_factor
        weight_at = all_at = weight.data_ptr() + s.offset * weight.itemsize
        kinds, anchor_at, grad_at, factor_at, value = number[weight.dtype], 0, 0, 0, 1.0
        if anchor is not None:
            anchor_at = anchor.data_ptr()  # type: ignore[attr-defined]
            kinds |= number[anchor.dtype] << _ANCHOR
            all_at |= anchor_at
        if grad is not None:
            grad_at = grad.data_ptr() + s.offset * grad.itemsize
            kinds |= number[grad.dtype] << _GRAD
            all_at |= grad_at
            if isinstance(factor, Tensor):
                factor_at = factor.data_ptr()
                kinds |= number[factor.dtype] << _FACTOR
            else:
                value = factor
        if all_at % 16 == 0:
            kinds |= _ALIGNED
        rows.append(pack(weight_at, anchor_at, grad_at, factor_at, value, s.numel, kinds))
        all_kinds.append(kinds)
    return b"".join(rows), all_kinds


def _pack_moments(
    slices: Sequence[Slice], moments: Sequence[Moments], slice_kinds: Sequence[int]
) -> tuple[bytes, list[int]]:
    """Rows as the kernels read them, and each slice's kinds with those of its moments."""
    rows, pack = [], _MOMENTS_ROW.pack
    all_kinds: list[int] = []
    for s, m, kinds in zip(slices, moments, slice_kinds, strict=True):
        shift = s.offset * m.exp_avg.itemsize
        exp_avg, exp_avg_sq = m.exp_avg.data_ptr() + shift, m.exp_avg_sq.data_ptr() + shift
        max_exp_avg_sq = 0
        kinds |= _KINDS[m.exp_avg.dtype] << _STATE
        if m.max_exp_avg_sq is not None:
            max_exp_avg_sq = m.max_exp_avg_sq.data_ptr() + shift
            kinds |= _AMSGRAD
        if (exp_avg | exp_avg_sq | max_exp_avg_sq) % 16:
            kinds &= ~_ALIGNED
        rows.append(pack(exp_avg, exp_avg_sq, max_exp_avg_sq, kinds))
        all_kinds.append(kinds)
    return b"".join(rows), all_kinds
