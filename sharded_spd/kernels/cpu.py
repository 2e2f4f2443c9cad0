"""The compiled kernels on slices in host memory: one pass over them, one call for all of a step."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sharded_spd.kernels.base import Moments, Slice, Table
from sharded_spd.kernels.compile import load_library

_CHUNK = 65536  # as in cpu.c
_KINDS = {torch.float32: 1, torch.float64: 2, torch.bfloat16: 3, torch.float16: 4}
_ROW = struct.Struct("=8qd")
_MOMENTS_ROW = struct.Struct("=4q")


class CpuKernels:
    """C, compiled on first use; see `Backend`."""

    name = "cpu"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def takes(self, *tensors: Tensor | None) -> bool:
        """See `Backend`."""
        for t in tensors:
            if t is not None and not (
                t.is_cpu
                and t.dtype in _KINDS
                and t.is_contiguous()
                and (type(t) is Tensor or type(t) is torch.nn.Parameter)
            ):
                return False
        return True

    def table(self, slices: Sequence[Slice], last: Table | None = None) -> Table:
        """See `Backend`."""
        return CpuTable(self._library, slices)


class CpuTable:
    """Addresses of slices, as the C code reads them; see `Table`."""

    def __init__(self, library: ctypes.CDLL, slices: Sequence[Slice]) -> None:
        self._library = library
        self._slices = slices
        rows, chunk = [], 0
        pack, kinds = _ROW.pack, _KINDS
        for s in slices:
            weight, anchor, grad, factor = s.weight, s.anchor, s.grad, s.grad_factor
            rows.append(
                pack(
                    weight.data_ptr() + s.offset * weight.itemsize,
                    0 if anchor is None else anchor.data_ptr(),  # type: ignore[attr-defined]
                    0 if grad is None else grad.data_ptr() + s.offset * grad.itemsize,
                    kinds[weight.dtype],
                    0 if anchor is None else kinds[anchor.dtype],
                    0 if grad is None else kinds[grad.dtype],
                    s.numel,
                    chunk,
                    factor if isinstance(factor, float) else float(factor),
                )
            )
            chunk += -(-s.numel // _CHUNK)
        self._rows, self._chunks = b"".join(rows), chunk

    def sums(self, *, grads: bool) -> Tensor:
        """See `Table`."""
        return self._call(self._library.spd_sums, 2, ctypes.c_int(grads))

    def adam_(self, moments: Sequence[Moments], numbers: Tensor) -> Tensor:
        """See `Table`."""
        rows = []
        for s, m in zip(self._slices, moments, strict=True):
            at = s.offset * m.exp_avg.itemsize
            max_exp_avg_sq = 0 if m.max_exp_avg_sq is None else m.max_exp_avg_sq.data_ptr() + at
            exp_avg, exp_avg_sq = m.exp_avg.data_ptr() + at, m.exp_avg_sq.data_ptr() + at
            rows.append(_MOMENTS_ROW.pack(exp_avg, exp_avg_sq, max_exp_avg_sq, _KINDS[m.exp_avg.dtype]))
        numbers = numbers.contiguous()
        sums = self._call(self._library.spd_adam, 3, b"".join(rows), ctypes.c_void_p(numbers.data_ptr()))
        stepped = [(s.weight, m) for s, m in zip(self._slices, moments, strict=True) if s.grad is not None]
        written = [(weight, m.exp_avg, m.exp_avg_sq, m.max_exp_avg_sq) for weight, m in stepped]
        increment_version([t for tensors in written for t in tensors if t is not None])
        return sums

    def pull_(self, s: Tensor) -> None:
        """See `Table`."""
        s = s.contiguous()
        self._library.spd_pull(
            self._rows,
            ctypes.c_int64(len(self._slices)),
            ctypes.c_int64(self._chunks),
            ctypes.c_void_p(s.data_ptr()),
            ctypes.c_int(torch.get_num_threads()),
        )
        increment_version([own.weight for own, share in zip(self._slices, s.tolist(), strict=True) if share])

    def _call(self, function: Callable[..., object], columns: int, *more: object) -> Tensor:
        num = len(self._slices)
        out = torch.empty(num, columns, dtype=torch.float64)
        partial = torch.empty(max(self._chunks, 1), columns, dtype=torch.float64)
        function(
            self._rows,
            ctypes.c_int64(num),
            ctypes.c_int64(self._chunks),
            ctypes.c_void_p(partial.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_int(torch.get_num_threads()),
            *more,
        )
        return out


def cpu_kernels() -> CpuKernels | None:
    """The compiled kernels; None if there are none."""
    library = load_library()
    return None if library is None else CpuKernels(library)
