"""Which backend works on which device."""

from __future__ import annotations

from functools import cache

from sharded_spd.kernels.base import Backend
from sharded_spd.kernels.cpu import cpu_kernels
from sharded_spd.kernels.reference import ReferenceKernels

REFERENCE: Backend = ReferenceKernels()
"""Plain torch; always there."""


@cache
def kernels_for(device_type: str) -> Backend:
    """The fastest backend that is there for a kind of device."""
    found: Backend | None = cpu_kernels() if device_type == "cpu" else None
    return REFERENCE if found is None else found
