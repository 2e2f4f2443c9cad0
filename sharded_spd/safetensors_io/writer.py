"""Writing safetensors files tensor by tensor, so that no more than one of them is held on the host."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from sharded_spd.safetensors_io.reader import FLOATS

DTYPES: Mapping[torch.dtype, str] = {
    **{dtype: name for name, dtype in FLOATS.items()},
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""What safetensors calls the dtypes that it knows."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """How many bytes it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stored_as(self) -> str:
        """What safetensors calls its dtype.

        Raises:
            TypeError: it has no such dtype.
        """
        if self.dtype not in DTYPES:
            raise TypeError(f"{self.name}: safetensors has no {self.dtype}")
        return DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class RawEntry:
    """A tensor whose bytes come from another file, of whatever kind that says."""

    name: str
    stored_as: str
    shape: tuple[int, ...]
    num_bytes: int


class TensorFile:
    """A new safetensors file of `entries`, whose tensors are appended in that order; on the disk when closed.

    Raises:
        TypeError: for a dtype that safetensors has not.
        OSError: where it cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        entries: Sequence[Entry | RawEntry],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
        begin = 0
        for entry in entries:
            end = begin + entry.num_bytes
            header[entry.name] = {
                "dtype": entry.stored_as,
                "shape": list(entry.shape),
                "data_offsets": [begin, end],
            }
            begin = end
        text = json.dumps(header).encode("utf-8")
        text += b" " * (-len(text) % 8)
        self._file = open(path, "wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def append(self, tensor: Tensor) -> None:
        """The next tensor, whole or in consecutive parts, from any device."""
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            self._file.write(flat.view(torch.uint8).numpy().data)

    def append_bytes(self, data: memoryview) -> None:
        """The same of values as they are to lie in the file."""
        self._file.write(data)

    def close(self) -> None:
        """Have it all on the disk."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self._file.close()
