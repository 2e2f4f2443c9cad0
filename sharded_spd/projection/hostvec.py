"""Host scalars as device vectors, uploaded only when they change, and device scalars read without waiting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class HostVector:
    """A vector on `device` made of host numbers and 0-d device tensors; float64 unless said otherwise."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float64) -> None:
        self._device = device
        self._host: list[Any] = []
        self._vector = torch.empty(0, dtype=dtype, device=device)

    def update(self, values: Sequence[float | Tensor]) -> Tensor:
        """The vector of `values`, `[len(values)]`; no upload where they are the last ones."""
        on_device = {i: v for i, v in enumerate(values) if isinstance(v, Tensor) and v.device.type != "cpu"}
        vector = self.update_numbers([0.0 if i in on_device else float(v) for i, v in enumerate(values)])
        if not on_device:
            return vector
        vector = vector.clone()
        for i, value in on_device.items():
            vector[i] = value.to(device=self._device, dtype=vector.dtype)
        return vector

    def update_numbers(self, numbers: list[Any]) -> Tensor:
        """The same of host numbers alone."""
        if numbers != self._host:
            self._host = numbers
            upload = torch.tensor(numbers, dtype=self._vector.dtype, pin_memory=self._device.type == "cuda")
            self._vector = upload.to(self._device, non_blocking=True)
        return self._vector


def is_capturing() -> bool:
    """Whether a CUDA graph is captured: the host must not ask for an event then."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class LateCopy:
    """A copy of a tensor on the host, of which nobody has to wait before it is asked for."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._copy = tensor.clone()

    def wait(self) -> Tensor:
        """The copy, once it has arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy


class LateScalar:
    """A number that is computed on the device now and read on the host later, without waiting for it."""

    def __init__(self) -> None:
        self._copy: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def post(self, value: Tensor) -> None:
        """Start copying a 0-d tensor; a copy under way is left to finish first."""
        if self._copy is not None:
            return
        if value.device.type == "cuda":
            self._copy = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._copy.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._copy = value.clone()

    def take(self) -> float | None:
        """The posted number once it has arrived, else None."""
        if self._copy is None or (self._event is not None and not self._event.query()):
            return None
        number = float(self._copy)
        self._copy = self._event = None
        return number
