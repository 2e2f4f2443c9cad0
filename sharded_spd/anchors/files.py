"""Anchors from a safetensors checkpoint on disk, of which each rank reads only its own slices."""

from __future__ import annotations

import difflib
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal

import torch

from sharded_spd.anchors.base import Values
from sharded_spd.anchors.reader import StoredTensor, load_json, read_header, read_piece
from sharded_spd.errors import AnchorError
from sharded_spd.layout import ShardSlice
from sharded_spd.names import match_names

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_INDEX = ".safetensors.index.json"
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
        self._files: dict[str, str] | None = None
        self._headers: dict[str, dict[str, StoredTensor]] = {}
        self._names: dict[str, str | None] = {}

    @property
    def source(self) -> str:
        """The checkpoint's path, as it was given."""
        return self._path

    def problems(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """One sentence per layer (or file) that cannot be served with that full shape; empty when all can.

        Names are settled here, over all layers at once; `fetch` follows.
        """
        try:
            files = self._tensor_files()
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
                tensor = self._tensor(key)
            except AnchorError as error:
                broken[str(error)].append(layer)
                continue
            found += _misfits(layer, tuple(shape), tensor)
        return [f"{error} (needed for {_some(layers)})" for error, layers in broken.items()] + found

    def strays(self, model_fqns: Sequence[str]) -> list[str]:
        """One sentence if the checkpoint goes on where the model ends: layers of the same kinds.

        Other tensors that the model lacks (a head of the pre-training, buffers) are nobody's concern.
        """
        files = self._tensor_files()
        claimed = set(match_names(list(model_fqns), files).values())
        kinds = {_NUMBER.sub("#", name) for name in claimed}
        strays = [name for name in files if name not in claimed and _NUMBER.sub("#", name) in kinds]
        if not strays:
            return []
        return [
            f"{self._path}: holds {len(strays)} tensors that the model lacks although it has their like "
            f"({_some(strays)}), so it is probably a larger model's"
        ]

    def fetch(self, piece: ShardSlice) -> Values | None:
        """Read the values of `piece` as a fresh 1-D tensor `[piece.numel]`; None: anchored at zero.

        Raises:
            AnchorError: the checkpoint lacks the layer, its file is damaged, or the piece lies outside of it.
        """
        try:
            if piece.layer not in self._names:
                self._names[piece.layer] = match_names([piece.layer], self._tensor_files()).get(piece.layer)
            key = self._names[piece.layer]
            if key is not None:
                return self._read(self._tensor(key), piece)
        except AnchorError as error:
            raise AnchorError(f"{piece.layer}: {error}") from None
        if self._zero:
            return None
        raise AnchorError(self._missing(piece.layer, suggest=True))

    def _read(self, tensor: StoredTensor, piece: ShardSlice) -> Values:
        return read_piece(tensor, piece.region, numel=piece.numel, dtype=self._dtype)

    def _tensor(self, key: str) -> StoredTensor:
        path = self._tensor_files()[key]
        header = self._header(path)
        if key not in header:
            raise AnchorError(f"{path}: lacks tensor {key!r}, which the index of {self._path} says it holds")
        return header[key]

    def _header(self, path: str) -> dict[str, StoredTensor]:
        if path not in self._headers:
            self._headers[path] = read_header(path)
        return self._headers[path]

    def _tensor_files(self) -> dict[str, str]:
        """Find the file of each tensor, by the tensor's name."""
        if self._files is None:
            root = Path(os.path.expanduser(self._path))
            try:
                self._files = self._locate(root)
            except OSError as error:
                raise AnchorError(f"{root}: cannot be read: {error.strerror}") from None
        return self._files

    def _locate(self, root: Path) -> dict[str, str]:
        if root.is_dir():
            indices = sorted(root.glob("*" + _INDEX))
            if len(indices) > 1:
                names = _some([path.name for path in indices])
                raise AnchorError(f"{root}: holds several indices ({names}); name one of them")
            return _read_index(indices[0]) if indices else self._unite(root)
        if root.name.endswith(".json"):
            return _read_index(root)
        if root.exists():
            return dict.fromkeys(self._header(str(root)), str(root))
        raise AnchorError(
            f"{self._path}: no such file or directory; wanted the path of a safetensors checkpoint, "
            '"snapshot", "deferred" or "zero"'
        )

    def _unite(self, root: Path) -> dict[str, str]:
        """List all files of a directory without an index, whose tensors must be distinct."""
        paths = sorted(root.glob("*.safetensors"))
        if not paths:
            others = sorted(p.name for p in root.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            hint = f"; {_some(others)} would have to be unpickled: save as safetensors" if others else ""
            raise AnchorError(f"{root}: holds no *.safetensors and no *{_INDEX}{hint}")
        files: dict[str, str] = {}
        for path in paths:
            for key in self._header(str(path)):
                if key in files:
                    both = f"{Path(files[key]).name} and {path.name}"
                    raise AnchorError(f"{root}: {both} both hold {key!r}; name one file or its index")
                files[key] = str(path)
        return files

    def _missing(self, layer: str, *, suggest: bool) -> str:
        near = difflib.get_close_matches(layer, self._tensor_files(), n=1) if suggest else []
        closest = f" (closest there: {near[0]})" if near else ""
        return f"{layer}: missing in {self._path}{closest}; anchor_missing: zero would anchor it at zero"

    def _nothing_found(self, layers: list[str], keys: list[str]) -> str:
        return (
            f"{self._path}: holds none of the {len(layers)} layers, so it is probably the wrong file; "
            f"layers: {_some(layers)}; tensors there: {_some(keys)}; to anchor them all at zero, say "
            "anchor: zero"
        )


def _read_index(path: Path) -> dict[str, str]:
    """Read the file of each tensor from an index, which may name only files beside or below it."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise AnchorError(f"{path}: cannot be read: {error.strerror}") from None
    files = load_json(text, f"{path}: not a valid index").get("weight_map")
    if not isinstance(files, dict):
        wanted = "a weight_map of tensor to file"
        raise AnchorError(f"{path}: not a valid index: wanted {wanted}, got {files!r:.100}")
    for key, name in files.items():
        if not isinstance(name, str) or not name or "\0" in name:
            raise AnchorError(f"{path}: tensor {key!r}: wanted a file name, got {name!r:.100}")
        parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
        if ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
            raise AnchorError(f"{path}: tensor {key!r}: {name!r} leads out of the checkpoint's directory")
    return {key: str(path.parent / name) for key, name in files.items()}


def _misfits(layer: str, shape: tuple[int, ...], tensor: StoredTensor) -> list[str]:
    where = f"{tensor.path} ({tensor.name})"
    if tensor.shape != shape:
        return [f"{layer}: has shape {list(shape)}, in {where} it has {list(tensor.shape)}"]
    if tensor.dtype is None:
        return [f"{layer}: is {tensor.stored_as} in {where}; wanted floating point of 16 bits or more"]
    return []


def _some(names: list[str], limit: int = 5) -> str:
    more = f", ... ({len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
