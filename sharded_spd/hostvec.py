"""Host scalars as device vectors, uploaded only when they change, and device scalars read without waiting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class HostVector:
    """A float64 vector on `device` made of host numbers and 0-d device tensors."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host: list[float] = []
        self._vector = torch.empty(0, dtype=torch.float64, device=device)

    def update(self, values: Sequence[float | Tensor]) -> Tensor:
        """The vector of `values`, float64 `[len(values)]`; no upload where they are the last ones."""
        on_device = {i: v for i, v in enumerate(values) if isinstance(v, Tensor) and v.device.type != "cpu"}
        host = [0.0 if i in on_device else float(v) for i, v in enumerate(values)]
        if host != self._host:
            self._host = host
            upload = torch.tensor(host, dtype=torch.float64, pin_memory=self._device.type == "cuda")
            self._vector = upload.to(self._device, non_blocking=True)
        if not on_device:
            return self._vector
        vector = self._vector.clone()
        for i, value in on_device.items():
            vector[i] = value.to(device=self._device, dtype=torch.float64)
        return vector


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
