"""Anchors from a safetensors checkpoint on disk, of which each rank reads only its own slices."""

from __future__ import annotations

import difflib
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from sharded_spd.anchors.base import Cast, Values
from sharded_spd.anchors.casting import may_lose, read_cast
from sharded_spd.anchors.checkpoint import Checkpoint
from sharded_spd.anchors.paths import some
from sharded_spd.anchors.reader import StoredTensor, read_piece
from sharded_spd.errors import AnchorError
from sharded_spd.layout import ShardSlice
from sharded_spd.names import match_names

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NUMBER = re.compile(r"\d+")


class FileAnchor:
    """Pre-trained values in a safetensors file, a sharded index, or a directory with either.

    Making one does not touch the disk: what is wrong with the files comes out of `problems`, so that all
    ranks can agree on it first. `dtype` "auto" keeps the stored dtype. `missing` "zero" anchors layers that
    the checkpoint lacks at zero. No file stays open.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        missing: Literal["raise", "zero"] = "raise",
    ) -> None:
        if dtype not in _DTYPES:
            raise AnchorError(f"dtype: wanted one of {', '.join(_DTYPES)}, got {dtype!r}")
        if missing not in ("raise", "zero"):
            raise AnchorError(f"missing: wanted raise or zero, got {missing!r}")
        self._path = os.fspath(path)
        self._dtype = _DTYPES[dtype]
        self._zero = missing == "zero"
        self._stored = Checkpoint(self._path)
        self._names: dict[str, str | None] = {}
        self._casts: dict[str, Cast] = {}

    @property
    def source(self) -> str:
        """The checkpoint's path, as it was given."""
        return self._path

    def problems(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """One sentence per layer (or file) that cannot be served with that full shape; empty when all can.

        Names are settled here, over all layers at once; `fetch` follows.
        """
        try:
            files, _ = self._stored.files(), self._stored.manifest()
            names = match_names(list(shapes), files)
        except AnchorError as error:
            return [str(error)]
        nothing = bool(shapes) and not names and not any(self._names.values())
        self._names.update({layer: names.get(layer) for layer in shapes})
        if nothing and self._zero:
            return [self._nothing_found(list(shapes), list(files))]
        found: list[str] = []
        broken: dict[str, list[str]] = defaultdict(list)
        for layer, shape in shapes.items():
            key = names.get(layer)
            if key is None:
                found += [] if self._zero else [self._missing(layer, suggest=len(found) < 3)]
                continue
            try:
                tensor = self._stored.tensor(key)
                file, fault = self._stored.fault(tensor)
            except AnchorError as error:
                broken[str(error)].append(layer)
                continue
            if file is not None:
                broken[file].append(layer)
            found += _misfits(layer, tuple(shape), tensor) or ([f"{layer}: {fault}"] if fault else [])
        return [f"{error} (needed for {some(layers)})" for error, layers in broken.items()] + found

    def strays(self, model_fqns: Sequence[str]) -> list[str]:
        """One sentence if the checkpoint goes on where the model ends: layers of the same kinds.

        Other tensors that the model lacks (a head of the pre-training, buffers) are nobody's concern.
        """
        files = self._stored.files()
        claimed = set(match_names(list(model_fqns), files).values())
        kinds = {_NUMBER.sub("#", name) for name in claimed}
        strays = [name for name in files if name not in claimed and _NUMBER.sub("#", name) in kinds]
        if not strays:
            return []
        return [
            f"{self._path}: holds {len(strays)} tensors that the model lacks although it has their like "
            f"({some(strays)}), so it is probably a larger model's"
        ]

    def fetch(self, piece: ShardSlice) -> Values | None:
        """Read the values of `piece` as a fresh 1-D tensor `[piece.numel]`; None: anchored at zero.

        Raises:
            AnchorError: the checkpoint lacks the layer, its file is damaged, or the piece lies outside of it.
        """
        try:
            if piece.layer not in self._names:
                self._names[piece.layer] = match_names([piece.layer], self._stored.files()).get(piece.layer)
            key = self._names[piece.layer]
            if key is not None:
                return self._read(self._stored.tensor(key), piece)
        except AnchorError as error:
            raise AnchorError(f"{piece.layer}: {error}") from None
        if self._zero:
            return None
        raise AnchorError(self._missing(piece.layer, suggest=True))

    def expected(self, layer: str) -> tuple[int, ...] | None:
        """The fingerprint that the manifest beside the files has of the layer; None without a manifest.

        Raises:
            AnchorError: the manifest is damaged.
        """
        manifest, key = self._stored.manifest(), self._names.get(layer)
        entry = manifest.tensors.get(key) if manifest is not None and key is not None else None
        return None if entry is None else entry.fingerprint

    def expected_overall(self) -> str | None:
        """The fingerprint of the manifest beside the files; None without one."""
        manifest = self._stored.manifest()
        return None if manifest is None else manifest.fingerprint

    def cast(self, layer: str) -> Cast | None:
        """What the last `fetch` of the layer did to its values; None where that could lose nothing."""
        return self._casts.get(layer)

    def _read(self, tensor: StoredTensor, piece: ShardSlice) -> Values:
        self._casts.pop(piece.layer, None)
        if self._dtype is None or tensor.dtype is None or not may_lose(tensor.dtype, self._dtype):
            return read_piece(tensor, piece.region, numel=piece.numel, dtype=self._dtype)
        values, self._casts[piece.layer] = read_cast(tensor, piece, self._dtype)
        return values

    def _missing(self, layer: str, *, suggest: bool) -> str:
        near = difflib.get_close_matches(layer, self._stored.files(), n=1) if suggest else []
        closest = f" (closest there: {near[0]})" if near else ""
        return f"{layer}: missing in {self._path}{closest}; anchor_missing: zero would anchor it at zero"

    def _nothing_found(self, layers: list[str], keys: list[str]) -> str:
        return (
            f"{self._path}: holds none of the {len(layers)} layers, so it is probably the wrong file; "
            f"layers: {some(layers)}; tensors there: {some(keys)}; to anchor them all at zero, say "
            "anchor: zero"
        )


def _misfits(layer: str, shape: tuple[int, ...], tensor: StoredTensor) -> list[str]:
    where = f"{tensor.path} ({tensor.name})"
    if tensor.shape != shape:
        return [f"{layer}: has shape {list(shape)}, in {where} it has {list(tensor.shape)}"]
    if tensor.dtype is None:
        return [f"{layer}: is {tensor.stored_as} in {where}; wanted floating point of 16 bits or more"]
    return []
