"""Prefetch of anchors from host memory: the next piece is copied to the device while one is in use.

The work goes through the slices in order, chunk by chunk. So a request for one piece also starts the copy of
the next, on a side stream, into the buffer that the previous piece has left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from sharded_spd.anchors.base import Values
from sharded_spd.rules.statistics import CHUNK

PIECE_BYTES = 8 << 20
"""Most bytes copied at a time; each device holds two such buffers during a step."""


class Carrier(Protocol):
    """Copies pieces into two buffers on the device."""

    @property
    def device(self) -> torch.device:
        """The target device."""
        ...

    def start(self, slot: int, piece: Tensor) -> None:
        """Start to copy into a buffer, after the work that is enqueued on its old piece."""
        ...

    def wait(self, slot: int) -> Tensor:
        """The piece in a buffer; work enqueued from now on waits for its copy."""
        ...


class CudaCarrier:
    """Copies on a side stream. The host waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = torch.cuda.Stream(device)
        self._buffers = [torch.empty(PIECE_BYTES, dtype=torch.uint8, device=device) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]
        self._pieces = list(self._buffers)
        self._readers = [torch.cuda.current_stream(device) for _ in range(2)]
        for buffer in self._buffers:
            buffer.record_stream(self._side)

    def start(self, slot: int, piece: Tensor) -> None:
        """See `Carrier`."""
        self._side.wait_stream(self._readers[slot])
        with torch.cuda.stream(self._side):
            target = self._buffers[slot][: piece.numel() * piece.itemsize].view(piece.dtype)
            target.copy_(piece, non_blocking=True)
            self._copied[slot].record(self._side)
        self._pieces[slot] = target

    def wait(self, slot: int) -> Tensor:
        """See `Carrier`."""
        self._readers[slot] = torch.cuda.current_stream(self.device)
        self._readers[slot].wait_event(self._copied[slot])
        return self._pieces[slot]


@dataclass(frozen=True, slots=True, eq=False)
class AnchorChunk:
    """Values `[begin, end)` of `values`."""

    values: Values
    begin: int
    end: int

    def is_in(self, other: AnchorChunk | None) -> bool:
        """Whether the other is the same piece of the same values."""
        return other is not None and other.values is self.values and other.begin == self.begin

    def holds(self, begin: int, end: int) -> bool:
        """Whether `[begin, end)` lies within."""
        return self.begin <= begin and end <= self.end


class Lane:
    """Two buffers, and which piece is in which."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self._slots: list[AnchorChunk | None] = [None, None]
        self._last = 1

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self._carrier.device

    def get(self, piece: AnchorChunk, following: AnchorChunk | None) -> Tensor:
        """A piece on the device, valid until the second request for another; starts to copy the next."""
        if not piece.is_in(self._slots[self._last]):
            self._last = 1 - self._last
            if not piece.is_in(self._slots[self._last]):
                self._start(self._last, piece)
        buffer = self._carrier.wait(self._last)
        if following is not None and not following.is_in(self._slots[1 - self._last]):
            self._start(1 - self._last, following)
        return buffer

    def _start(self, slot: int, piece: AnchorChunk) -> None:
        self._slots[slot] = piece
        self._carrier.start(slot, piece.values[piece.begin : piece.end])


class Ahead:
    """Values in host memory, read on the device; see `Values`. `after` are the values needed next."""

    def __init__(self, values: Values, lane: Lane, after: Ahead | None) -> None:
        self._values = values
        self._lane = lane
        self._after = after
        # A multiple of CHUNK, so that no chunk spans two pieces.
        self._step = max(PIECE_BYTES // values.dtype.itemsize // CHUNK, 1) * CHUNK

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in host memory."""
        return self._values.dtype

    @property
    def device(self) -> torch.device:
        """The device."""
        return self._lane.device

    def numel(self) -> int:
        """The number of values."""
        return self._values.numel()

    def piece(self, begin: int) -> AnchorChunk | None:
        """The piece that contains `begin`; past the end, the first of `after`."""
        start = begin // self._step * self._step
        if start < self.numel():
            return AnchorChunk(self._values, start, min(start + self._step, self.numel()))
        return self._after.piece(0) if self._after is not None else None

    def __getitem__(self, cut: slice, /) -> Tensor:
        """A chunk on the device, valid until the second request for another piece."""
        begin, end, _ = cut.indices(self.numel())
        piece = self.piece(begin)
        if piece is None or piece.values is not self._values or not piece.holds(begin, end):
            return self._values[cut].to(self.device, non_blocking=True)
        buffer = self._lane.get(piece, self.piece(piece.begin + self._step))
        return buffer[begin - piece.begin : end - piece.begin]


_lanes: WeakValueDictionary[torch.device, Lane] = WeakValueDictionary()


def ahead(wanted: Sequence[tuple[Values | None, torch.device]]) -> list[Values | None]:
    """Wrap values so that they can be read on the device that needs each, in the order of the work.

    Values that are there already, or have no stream to copy on, stay as they are.
    """
    result: list[Values | None] = []
    nexts: dict[torch.device, Ahead] = {}
    for values, device in reversed(wanted):
        if values is None or values.numel() == 0 or device.type != "cuda" or values.device == device:
            result.append(values)
            continue
        lane = _lanes.get(device)
        if lane is None:
            lane = _lanes[device] = Lane(CudaCarrier(device))
        nexts[device] = Ahead(values, lane, nexts.get(device))
        result.append(nexts[device])
    return result[::-1]
