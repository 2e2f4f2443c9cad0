"""Chooses the backend for tensors."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

from sharded_spd.kernels.base import Backend, Slice
from sharded_spd.kernels.check import check
from sharded_spd.kernels.chunked import ChunkedKernels
from sharded_spd.kernels.cpu import cpu_kernels
from sharded_spd.kernels.reference import ReferenceKernels
from sharded_spd.kernels.switch import SWITCH, choice

_LOG = logging.getLogger(__name__)
_OLDEST_GPU = (8, 0)
"""Compute capability (NVIDIA) from which bfloat16 is known to the hardware."""

REFERENCE: Backend = ReferenceKernels()
"""Plain torch; always there."""


@cache
def kernels_for(device_type: str) -> Backend:
    """The fastest available backend for a device type.

    Raises:
        RuntimeError: where one is asked for (see `SWITCH`) that cannot be had.
    """
    chosen, found = choice(), None
    interpreted = chosen == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if chosen != "reference" and (device_type == "cuda" or (device_type == "cpu" and interpreted)):
        found = _triton(device_type, insist=chosen == "triton")
    elif device_type == "cpu":
        found = _compiled(insist=chosen == "cpu")
    return REFERENCE if found is None else found


def _compiled(*, insist: bool) -> Backend | None:
    """The compiled kernels, if one step of theirs equals plain torch's; else None."""
    kernels = cpu_kernels()
    if kernels is None:
        return None
    try:
        check(kernels, "cpu")
    except RuntimeError as error:
        if insist:
            raise RuntimeError(
                f"{SWITCH}=cpu: the compiled kernels are wrong ({error}). Try another compiler ($CC), or set "
                f"{SWITCH}=auto"
            ) from error
        _LOG.warning("plain torch is used on cpu, the compiled kernels are wrong: %s", error)
        return None
    return kernels


def _triton(device_type: str, *, insist: bool) -> Backend | None:
    """Triton's kernels, if one step of theirs equals plain torch's; else None."""
    try:
        if device_type == "cuda" and not torch.version.hip:
            capability = torch.cuda.get_device_capability()
            if capability < _OLDEST_GPU:
                raise RuntimeError(f"compute capability {capability}; wanted {_OLDEST_GPU} or newer")
        from sharded_spd.kernels.triton_kernels import INTERPRETED
        from sharded_spd.kernels.triton_tables import TritonKernels

        if INTERPRETED and device_type == "cuda":
            raise RuntimeError("TRITON_INTERPRET is set, and Triton's interpreter reads host memory alone")
        kernels = TritonKernels(device_type)
        # It needs a C compiler and a matching driver: problems with them show at the first launch.
        check(kernels, device_type)
    except Exception as error:  # whatever Triton, a compiler or the driver may raise
        text = f"{type(error).__name__}: {error}"
        if insist:
            raise RuntimeError(
                f"{SWITCH}=triton: Triton cannot be used on {device_type} tensors ({text}). Install the "
                f"triton that this torch asks for, and a C compiler; or set {SWITCH}=auto"
            ) from error
        _LOG.warning("plain torch is used on %s, Triton cannot be had: %s", device_type, text)
        return None
    return kernels


@cache
def _chunked(backend: Backend) -> Backend:
    return ChunkedKernels(backend)


def backend_names(device_types: Iterable[str]) -> dict[str, str]:
    """The backend of this process for each device type.

    Raises:
        RuntimeError: where one is asked for that cannot be had.
    """
    return {device_type: kernels_for(device_type).name for device_type in device_types}


def choose(s: Slice, plain: frozenset[str] = frozenset()) -> Backend:
    """The fastest backend that takes a slice; plain torch for device types in `plain`."""
    device_type = s.weight.device.type
    if device_type in plain:
        return REFERENCE
    backend, anchor = kernels_for(device_type), s.anchor
    if anchor is None or isinstance(anchor, Tensor):
        return backend if backend.takes(s.weight, s.grad, anchor) else REFERENCE
    like = torch.empty(0, dtype=anchor.dtype, device=s.weight.device)
    return _chunked(backend) if backend.takes(s.weight, s.grad, like) else REFERENCE
