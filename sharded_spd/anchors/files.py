"""Anchors from a safetensors checkpoint on disk; each rank reads only its own slices."""

from __future__ import annotations

import difflib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from sharded_spd.anchors import naming
from sharded_spd.anchors.adapters import neutral_at
from sharded_spd.anchors.base import Cast, Values
from sharded_spd.anchors.beyond import beyond
from sharded_spd.anchors.casting import may_lose, read_cast, same_values
from sharded_spd.anchors.checkpoint import Checkpoint
from sharded_spd.anchors.fingerprint import slice_fingerprint
from sharded_spd.anchors.paths import some
from sharded_spd.anchors.rows import other_rows, said, shared_part
from sharded_spd.errors import AnchorError
from sharded_spd.safetensors_io.reader import StoredTensor, read_piece
from sharded_spd.sharding.layout import ModelFacts, ShardSlice
from sharded_spd.sharding.names import apply_rules, check_rules

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NUMBER = re.compile(r"\d+")


class FileAnchor:
    """Pre-trained values in a safetensors file, a sharded index, or a directory with either.

    The constructor does not touch the disk: `problems` reports errors of the files, so that all ranks can
    agree on them first. `dtype` "auto" keeps the stored dtype. `missing` "zero" anchors layers that the
    checkpoint lacks at zero. `names` maps patterns on full layer names (`re.fullmatch`, the first wins) to
    names in the file; several may map to one tensor. No file stays open.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        missing: Literal["raise", "zero"] = "raise",
        names: Mapping[str, str] | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise AnchorError(f"dtype: wanted one of {', '.join(_DTYPES)}, got {dtype!r}")
        if missing not in ("raise", "zero"):
            raise AnchorError(f"missing: wanted raise or zero, got {missing!r}")
        self._path = os.fspath(path)
        self._dtype = _DTYPES[dtype]
        self._zero = missing == "zero"
        self._rules = check_rules({} if names is None else names)
        self._stored = Checkpoint(self._path)
        self._facts = ModelFacts()
        self._fqns: frozenset[str] = frozenset()
        self._names: dict[str, str | None] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._rows: dict[str, int] = {}
        self._casts: dict[str, Cast] = {}

    @property
    def source(self) -> str:
        """The checkpoint's path, as given."""
        return self._path

    @property
    def names(self) -> dict[str, str | None]:
        """The tensor that each layer takes its values from; None: the file lacks it."""
        return dict(self._names)

    def know(self, facts: ModelFacts, fqns: Iterable[str]) -> None:
        """Store the model's facts about its layers, and all their names."""
        self._facts, self._fqns = facts, frozenset(fqns)

    def problems(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """One sentence per layer (or file) that cannot be served with that full shape; empty when all can.

        Names are resolved here, for all layers at once; `fetch` uses them.
        """
        try:
            files, _ = self._stored.files(), self._stored.manifest()
            naming_ = self._find(shapes)
        except AnchorError as error:
            return [str(error)]
        names, found = naming_.keys, self._idle_rules(shapes)
        nothing = bool(shapes) and not names and not any(self._names.values())
        self._names.update({layer: names.get(layer) for layer in shapes})
        self._shapes.update({layer: tuple(shape) for layer, shape in shapes.items()})
        if nothing and self._zero:
            return [*found, self._nothing_found(list(shapes), list(files))]
        broken: dict[str, list[str]] = defaultdict(list)
        for layer, shape in shapes.items():
            key = names.get(layer)
            if key is None:
                if layer in naming_.otherwise:
                    found.append(self._elsewhere(layer, naming_.otherwise[layer]))
                elif not self._zero:
                    found.append(self._missing(layer, suggest=len(found) < 3))
                continue
            try:
                tensor = self._stored.tensor(key)
                file, fault = self._stored.fault(tensor)
            except AnchorError as error:
                broken[str(error)].append(layer)
                continue
            if file is not None:
                broken[file].append(layer)
            found += self._misfits(layer, tuple(shape), tensor) or ([f"{layer}: {fault}"] if fault else [])
        if found or broken:  # of a model that does not fit anyway, another number of rows is one sign more
            found += [
                self._misshapen(n, shapes[n], self._stored.tensor(names[n]))
                for n in shapes
                if n in self._rows
            ]
        return [f"{error} (needed for {some(layers)})" for error, layers in broken.items()] + found

    def _find(self, shapes: Mapping[str, tuple[int, ...]]) -> naming.Naming:
        def fits(layer: str, key: str) -> bool:
            return self._stored.tensor(key).shape == tuple(shapes[layer])

        return naming.find(list(shapes), self._stored.files(), self._facts, self._rules, fits)

    def _idle_rules(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Rules that match no layer of the model at all."""
        known = self._fqns or frozenset(shapes)
        listing = [*known, *(other for names in self._facts.ties.values() for other in names)]
        idle = [rule for rule in self._rules if not any(re.fullmatch(rule, name) for name in listing)]
        return [
            f"names: {rule!r} matches no layer; it must match a whole name (re.fullmatch); got "
            f"{some(sorted(known), 8)}"
            for rule in idle
        ]

    @staticmethod
    def _misshapen(layer: str, shape: Sequence[int], tensor: StoredTensor) -> str:
        where = f"{tensor.path} ({tensor.name})"
        return f"{layer}: has shape {list(shape)}, in {where} it has {list(tensor.shape)}"

    def _misfits(self, layer: str, shape: tuple[int, ...], tensor: StoredTensor) -> list[str]:
        where = f"{tensor.path} ({tensor.name})"
        self._rows.pop(layer, None)
        if tensor.shape != shape:
            names = (layer, *self._facts.ties.get(layer, ()), tensor.name)
            # Only a binding, which makes the model known, has the values of the rows that the file lacks.
            if not self._fqns or not other_rows(names, shape, tensor.shape, self._facts):
                return [self._misshapen(layer, shape, tensor)]
            self._rows[layer] = tensor.shape[0]
        if tensor.dtype is None:
            return [f"{layer}: is {tensor.stored_as} in {where}; wanted floating point of 16 bits or more"]
        return []

    def strays(self, model_fqns: Sequence[str]) -> tuple[list[str], list[str]]:
        """Layers of the checkpoint beyond the model's, as in a larger model.

        First those that its configuration or the loader leaves out on purpose (to predict several tokens),
        then the others. Tensors unlike any layer (a pre-training head, buffers) are ignored.
        """
        files = self._stored.files()
        claimed = set(naming.find(model_fqns, files, self._facts, self._rules, lambda *_: True).keys.values())
        kinds = {_NUMBER.sub("#", name) for name in claimed}
        strays = [name for name in files if name not in claimed and _NUMBER.sub("#", name) in kinds]
        on_purpose = set(beyond(strays, claimed, self._stored.folder))
        loader = self._facts.loader
        if loader is not None:
            cut = loader.loaded_from(self._stored.root)
            on_purpose |= {name for name in strays if cut or loader.ignores(name)}
        return [n for n in strays if n in on_purpose], [n for n in strays if n not in on_purpose]

    def at_start(self, layers: Iterable[str]) -> list[str]:
        """The layers that the file lacks and that zero would damage: they are anchored at their start."""
        lacking = [layer for layer in layers if self._names.get(layer) is None]
        return [layer for layer in lacking if neutral_at(layer, self._facts) == "start"] if self._zero else []

    def notes(self, layers: Iterable[str]) -> list[str]:
        """Notes for the user, to be given once: layers at zero, tables of another size."""
        listed = [layer for layer in layers if layer in self._names]
        resized = [layer for layer in listed if layer in self._rows]
        zero = [layer for layer in listed if self._names[layer] is None]
        found = []
        if resized:
            each = [said(n, self._shapes[n], (self._rows[n],)) for n in resized]
            found.append(f"{self._path}: resized tables of tokens: {some(each, 4)}")
        if zero:
            found.append(
                f"{self._path}: lacks {len(zero)} layer(s), anchored at zero (anchor_missing: zero): "
                f"{some(zero, 8)}"
            )
        return found

    def fetch(self, piece: ShardSlice, weight: Tensor | None = None) -> Values | None:
        """Read the values of `piece` as a fresh 1-D tensor `[piece.numel]`; None: anchored at zero.

        `weight`, this rank's own values of it, anchors the rows that the file lacks.

        Raises:
            AnchorError: the checkpoint lacks the layer, its file is damaged, or the piece lies outside of it.
        """
        try:
            if piece.layer not in self._names:
                found = naming.find(
                    [piece.layer], self._stored.files(), self._facts, self._rules, lambda *_: True
                )
                self._names[piece.layer] = found.keys.get(piece.layer)
            key = self._names[piece.layer]
            if key is not None:
                tensor = self._stored.tensor(key)
                if piece.layer in self._rows and weight is not None:
                    return self._read_rows(tensor, piece, weight)
                return self._read(tensor, piece)
        except AnchorError as error:
            raise AnchorError(f"{piece.layer}: {error}") from None
        if self._zero:
            return None
        raise AnchorError(self._missing(piece.layer, suggest=True))

    def _read_rows(self, tensor: StoredTensor, piece: ShardSlice, weight: Tensor) -> Tensor:
        """Of a table with another number of rows: what both have from the file, the rest from `weight`."""
        part = shared_part(piece, self._shapes[piece.layer], self._rows[piece.layer])
        dtype = self._dtype or tensor.dtype or weight.dtype
        own = FileAnchor._read(self, tensor, part)  # in memory, for not all of it lies in the file
        values = weight.detach().to(dtype, copy=True)
        values[: part.numel] = own[: part.numel].to(values.device)
        if piece.layer not in self._casts:  # a manifest knows of the file's rows alone
            stored = slice_fingerprint(own, part, tensor.shape)
            self._casts[piece.layer] = Cast(tuple(stored.tolist()), 0.0)
        return values

    def refuse_zero(self, piece: ShardSlice, weight: Tensor) -> str | None:
        """Why a layer that the file lacks must not be anchored at zero, by its values; None: it may be.

        Either it is a gain (one nonzero value throughout), or it equals a tensor of the file that belongs to
        no other layer: it is there under another name.
        """
        if self._names.get(piece.layer) is not None or neutral_at(piece.layer, self._facts) == "zero":
            return None
        if weight.numel() < 2 or not bool((weight != 0).any()):
            return None
        way_out = "anchor it at its start (anchor: snapshot) or leave it out (rule: none) by pattern"
        if bool((weight == weight[0]).all()):
            return (
                f"{piece.layer}: missing in {self._path}, and {float(weight[0]):g} throughout as the gain of "
                f"a norm is, so zero would switch off what it scales; {way_out}"
            )
        twin = self._twin(piece, weight)
        if twin is None:
            return None
        rule = naming.exact_rule(piece.layer, twin)
        return (
            f"{piece.layer}: has the values of {twin} in {self._path}; it is there under another name: {rule}"
        )

    def _twin(self, piece: ShardSlice, weight: Tensor) -> str | None:
        taken, shape = set(self._names.values()), self._shapes.get(piece.layer)
        for key in self._stored.files():
            tensor = None if key in taken else self._stored.tensor(key)
            if tensor is not None and tensor.shape == shape and tensor.dtype is not None:
                if same_values(weight, read_piece(tensor, piece.region, numel=piece.numel)):
                    return key
        return None

    def expected(self, layer: str) -> tuple[int, ...] | None:
        """The layer's fingerprint in the manifest beside the files; None without a manifest.

        Raises:
            AnchorError: the manifest is damaged.
        """
        manifest, key = self._stored.manifest(), self._names.get(layer)
        if layer in self._rows and self._rows[layer] > self._shapes[layer][0]:
            return None  # the layer has only some rows of the tensor
        entry = manifest.tensors.get(key) if manifest is not None and key is not None else None
        return None if entry is None else entry.fingerprint

    def expected_overall(self) -> str | None:
        """The fingerprint of the manifest beside the files; None without one."""
        manifest = self._stored.manifest()
        return None if manifest is None else manifest.fingerprint

    def cast(self, layer: str) -> Cast | None:
        """How the last `fetch` of the layer changed its values; None if the cast is lossless."""
        return self._casts.get(layer)

    def _read(self, tensor: StoredTensor, piece: ShardSlice) -> Values:
        self._casts.pop(piece.layer, None)
        if self._dtype is None or tensor.dtype is None or not may_lose(tensor.dtype, self._dtype):
            return read_piece(tensor, piece.region, numel=piece.numel, dtype=self._dtype)
        values, self._casts[piece.layer] = read_cast(tensor, piece, self._dtype)
        return values

    def _missing(self, layer: str, *, suggest: bool) -> str:
        files = self._stored.files()
        near = difflib.get_close_matches(layer, files, n=1) if suggest else []
        closest = f" (closest there: {near[0]})" if near else ""
        rule = naming.suggest(apply_rules(layer, self._rules), files) if suggest else None
        way = f"{rule} would find it, " if rule else ""
        return f"{layer}: missing in {self._path}{closest}; {way}anchor_missing: zero would anchor it at zero"

    def _elsewhere(self, layer: str, why: str) -> str:
        return (
            f"{layer}: missing in {self._path}, and not to be anchored at zero: {why}; anchor it at its "
            "start (anchor: snapshot) by pattern"
        )

    def _nothing_found(self, layers: list[str], keys: list[str]) -> str:
        return (
            f"{self._path}: holds none of the {len(layers)} layers, so it is probably the wrong file; "
            f"layers: {some(layers)}; tensors there: {some(keys)}; to anchor them all at zero, say "
            "anchor: zero"
        )
