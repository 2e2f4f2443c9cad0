"""The compiled kernels on slices in host memory: one pass over them, one call for all of a step."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharded_spd.kernels.compile import load_library

_CHUNK = 65536  # as in cpu.c
_KINDS = {torch.float32: 1, torch.float64: 2, torch.bfloat16: 3, torch.float16: 4}
_ROW = struct.Struct("=8qd")
_ADAM_ROW = struct.Struct("=12q6d")


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
    table, chunks = bytearray(), 0
    for s in slices:
        table += _ROW.pack(
            *_addresses(s.weight, s.anchor, s.grad),
            *_kinds(s.weight, s.anchor, s.grad),
            s.weight.numel(),
            chunks,
            s.grad_factor,
        )
        chunks += -(-s.weight.numel() // _CHUNK)
    return _call(library.spd_sums, table, len(slices), chunks, columns=2)


@dataclass(frozen=True, slots=True)
class AdamSlice:
    """What Adam steps of a slice, 1-D: its moments (`most` with amsgrad only) and the numbers of its group.

    `step` counts this step, too.
    """

    slice: Slice
    mean: Tensor
    square: Tensor
    most: Tensor | None
    lr: float
    betas: tuple[float, float]
    eps: float
    step: float


def adam(slices: Sequence[AdamSlice]) -> Tensor:
    """Step every slice as torch's fused Adam does (modified in place), and sum on the way.

    Returns <g, d>, |d|^2 before the step and |d|^2 after it, float64 `[len(slices), 3]`; d = w - w0.
    """
    library = load_library()
    if library is None:
        raise RuntimeError("the compiled kernels are not there; ask can_sum first")
    table, chunks = bytearray(), 0
    for a in slices:
        s = a.slice
        table += _ADAM_ROW.pack(
            *_addresses(s.weight, s.anchor, s.grad, a.mean, a.square, a.most),
            *_kinds(s.weight, s.anchor, s.grad, a.mean),
            s.weight.numel(),
            chunks,
            s.grad_factor,
            *a.betas,
            a.eps,
            a.lr / (1 - a.betas[0] ** a.step),
            math.sqrt(1 - a.betas[1] ** a.step),
        )
        chunks += -(-s.weight.numel() // _CHUNK)
    return _call(library.spd_adam, table, len(slices), chunks, columns=3)


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _kinds(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else _KINDS[t.dtype] for t in tensors]


def _call(
    function: Callable[..., object], table: bytearray, num: int, chunks: int, *, columns: int
) -> Tensor:
    out = torch.empty(num, columns, dtype=torch.float64)
    partial = torch.empty(max(chunks, 1), columns, dtype=torch.float64)
    function(
        (ctypes.c_char * len(table)).from_buffer(table),
        ctypes.c_int64(num),
        ctypes.c_int64(chunks),
        ctypes.c_void_p(partial.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int(torch.get_num_threads()),
    )
    return out
