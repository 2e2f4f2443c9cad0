"""Sums over slices in host memory by the compiled kernels: one pass, one call for all slices of a step."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharded_spd.kernels.compile import load_library

_CHUNK = 65536  # as in cpu.c
_KINDS = {torch.float32: 1, torch.float64: 2, torch.bfloat16: 3, torch.float16: 4}
_ROW = struct.Struct("=8qd")


@dataclass(frozen=True, slots=True)
class Slice:
    """1-D tensors of one slice; `anchor` None stands for zero, `grad` None where none is wanted."""

    weight: Tensor
    anchor: Tensor | None
    grad: Tensor | None
    grad_factor: float = 1.0


def can_sum(*tensors: Tensor | None) -> bool:
    """Whether the compiled kernels are there and read these tensors."""
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) is not Tensor and not isinstance(tensor, torch.nn.Parameter):
            return False
        if tensor.device.type != "cpu" or tensor.dtype not in _KINDS or not tensor.is_contiguous():
            return False
    return load_library() is not None


def sums(slices: Sequence[Slice]) -> Tensor:
    """<g, w - w0> and |w - w0|^2 of each slice, float64 `[len(slices), 2]`.

    Added up in an order that depends on a slice's length alone, not on the number of threads.
    """
    library = load_library()
    if library is None:
        raise RuntimeError("the compiled kernels are not there; ask can_sum first")
    out = torch.empty(len(slices), 2, dtype=torch.float64)
    table, chunks = bytearray(), 0
    for s in slices:
        table += _ROW.pack(
            *(0 if t is None else t.data_ptr() for t in (s.weight, s.anchor, s.grad)),
            *(0 if t is None else _KINDS[t.dtype] for t in (s.weight, s.anchor, s.grad)),
            s.weight.numel(),
            chunks,
            s.grad_factor,
        )
        chunks += -(-s.weight.numel() // _CHUNK)
    partial = torch.empty(max(chunks, 1), 2, dtype=torch.float64)
    rows = (ctypes.c_char * len(table)).from_buffer(table)
    library.spd_sums(
        rows,
        ctypes.c_int64(len(slices)),
        ctypes.c_int64(chunks),
        ctypes.c_void_p(partial.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int(torch.get_num_threads()),
    )
    return out
