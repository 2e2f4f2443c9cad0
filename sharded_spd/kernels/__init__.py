"""Fused kernels: the sums, Adam's step with them, and the pull, of many slices in one call."""

from sharded_spd.kernels.base import ADAM_NUMBERS, FORMED, Backend, Moments, Slice, Table
from sharded_spd.kernels.choose import REFERENCE, backend_names, choose, kernels_for

__all__ = [
    "ADAM_NUMBERS",
    "FORMED",
    "REFERENCE",
    "Backend",
    "Moments",
    "Slice",
    "Table",
    "backend_names",
    "choose",
    "kernels_for",
]
