"""Which backend works on what."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from sharded_spd.kernels.base import Backend, Slice
from sharded_spd.kernels.chunked import ChunkedKernels
from sharded_spd.kernels.cpu import cpu_kernels
from sharded_spd.kernels.reference import ReferenceKernels

REFERENCE: Backend = ReferenceKernels()
"""Plain torch; always there."""


@cache
def kernels_for(device_type: str) -> Backend:
    """The fastest backend that is there for a kind of device."""
    found: Backend | None = cpu_kernels() if device_type == "cpu" else None
    return REFERENCE if found is None else found


@cache
def _chunked(backend: Backend) -> Backend:
    return ChunkedKernels(backend)


def choose(s: Slice) -> Backend:
    """The fastest backend that takes a slice."""
    backend, anchor = kernels_for(s.weight.device.type), s.anchor
    if anchor is None or isinstance(anchor, Tensor):
        return backend if backend.takes(s.weight, s.grad, anchor) else REFERENCE
    like = torch.empty(0, dtype=anchor.dtype, device=s.weight.device)
    return _chunked(backend) if backend.takes(s.weight, s.grad, like) else REFERENCE
