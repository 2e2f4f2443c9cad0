"""anchor.json: what the files of an anchor held when it was made, to tell later whether they still do.

Of every tensor its shape, stored dtype, layout-independent fingerprint and the hashes of a few sampled
blocks; of every file its size and SHA-256. The fingerprint of what is no floating point of 16 bits or more
(buffers, masks) is of its bytes; that of the whole leaves those tensors out: no layer is anchored at them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from sharded_spd.anchors.blocks import hash_blocks
from sharded_spd.anchors.fingerprint import SEEDS, combine, in_words
from sharded_spd.anchors.paths import leads_out, some
from sharded_spd.errors import AnchorError
from sharded_spd.safetensors_io.reader import FLOATS, StoredTensor, load_json

MANIFEST = "anchor.json"
FORMAT = "sharded_spd.anchor"
VERSION = 1
_KEYS = ("format", "version", "source", "dtypes", "fingerprint", "files", "tensors")
_WORD, _BLOCK, _SHA256 = (re.compile(f"[0-9a-f]{{{digits}}}") for digits in (16, 32, 64))


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor; `fingerprint` as the binding's int64 sums give it, signed."""

    shape: tuple[int, ...]
    stored_as: str
    fingerprint: tuple[int, ...]
    blocks: tuple[str, ...]

    @property
    def is_float(self) -> bool:
        """Whether a layer can be anchored at it."""
        return self.stored_as in FLOATS


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """All tensors by name, all files by their path below the manifest's directory."""

    path: str
    source: str
    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, FileEntry]

    @property
    def dtypes(self) -> list[str]:
        """The stored dtypes that occur, as safetensors calls them."""
        return sorted({entry.stored_as for entry in self.tensors.values()})

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors that a layer can be anchored at."""
        return sum(prod(entry.shape) for entry in self.tensors.values() if entry.is_float)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of all tensors that a layer can be anchored at, by their names in the files."""
        return combine({name: e.fingerprint for name, e in self.tensors.items() if e.is_float})

    def file_fault(self, path: str, name: str, num_bytes: int) -> str | None:
        """Whether the file at `path`, here called `name`, is another one as a whole; None: not to be told."""
        if name not in self.files:
            return f"{path}: is not among the files that {self.path} is of"
        wanted = self.files[name].num_bytes
        if num_bytes == wanted:
            return None
        return f"{path}: is {num_bytes} bytes long, {wanted} by {self.path}: another file"

    def tensor_fault(self, tensor: StoredTensor, *, blocks: bool = True) -> str | None:
        """What can be told cheaply to be other than it was, in one sentence; None where nothing is.

        Raises:
            AnchorError: the file cannot be read.
        """
        where, entry = f"{tensor.path} ({tensor.name})", self.tensors.get(tensor.name)
        if entry is None:
            return f"{where}: {self.path} does not know that tensor"
        if (tensor.shape, tensor.stored_as) != (entry.shape, entry.stored_as):
            wanted = f"{entry.stored_as} {list(entry.shape)} by {self.path}"
            return f"{where}: is {tensor.stored_as} {list(tensor.shape)}, {wanted}"
        if blocks and hash_blocks(tensor) != entry.blocks:
            return other_values(where, self.path)
        return None


def other_values(where: str, manifest: str) -> str:
    """The message for stored values with a fingerprint, or blocks, other than in their manifest."""
    return f"{where}: has other values than {manifest} says: damaged, or another model's"


def write_manifest(manifest: Manifest) -> None:
    """Write it to its path, beside and renamed.

    Raises:
        OSError: it cannot be written.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "source": manifest.source,
        "dtypes": manifest.dtypes,
        "fingerprint": manifest.fingerprint,
        "files": {
            name: {"bytes": e.num_bytes, "sha256": e.sha256} for name, e in sorted(manifest.files.items())
        },
        "tensors": {
            name: {
                "shape": list(e.shape),
                "dtype": e.stored_as,
                "fingerprint": in_words(e.fingerprint),
                "blocks": list(e.blocks),
            }
            for name, e in sorted(manifest.tensors.items())
        },
    }
    path = Path(manifest.path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(_dump(content))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _dump(content: Mapping[str, Any]) -> str:
    """JSON with one line per file and per tensor."""
    parts = []
    for key, value in content.items():
        entries = value.items() if isinstance(value, dict) else ()
        lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries]
        text = "{\n" + ",\n".join(lines) + "\n }" if lines else json.dumps(value)
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        AnchorError: it cannot be read, is of a newer version, or is not what `write_manifest` writes.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise AnchorError(f"{path}: cannot be read: {error.strerror}") from None
    content = load_json(text, f"{path}: not a valid manifest")
    version = content.get("version")
    if content.get("format") != FORMAT or type(version) is not int:
        raise AnchorError(
            f"{path}: not a manifest of an anchor: wanted format {FORMAT!r} with a version, got "
            f"{content.get('format')!r:.100}"
        )
    if version != VERSION:
        raise AnchorError(f"{path}: has version {version}; this package reads version {VERSION}: upgrade it")
    try:
        manifest = _parse(str(path), content)
    except (_Malformed, KeyError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise AnchorError(f"{path}: not a valid manifest: {what}; remove it and build it anew") from None
    for key, own in (("dtypes", manifest.dtypes), ("fingerprint", manifest.fingerprint)):
        if content[key] != own:
            raise AnchorError(
                f"{path}: damaged or edited: {key} is {content[key]!r:.100}, its tensors give {own!r}; "
                "remove it and build it anew"
            )
    return manifest


class _Malformed(ValueError):
    pass


def _parse(path: str, content: Mapping[str, Any]) -> Manifest:
    _check_keys("the manifest", content, _KEYS)
    if not isinstance(content["source"], str):
        raise _Malformed(f"source is {content['source']!r:.100}")
    files, tensors = {}, {}
    for name, entry in _mapping("files", content["files"]).items():
        _check_keys(f"file {name!r}", entry, ("bytes", "sha256"))
        if not name or "\0" in name or leads_out(name):
            raise _Malformed(f"file {name!r} leads out of the manifest's directory")
        if not _is_count(entry["bytes"]) or not _is_hex(_SHA256, entry["sha256"]):
            raise _Malformed(f"file {name!r} is described by {entry!r:.200}")
        files[name] = FileEntry(entry["bytes"], entry["sha256"])
    for name, entry in _mapping("tensors", content["tensors"]).items():
        _check_keys(f"tensor {name!r}", entry, ("shape", "dtype", "fingerprint", "blocks"))
        words, shape, blocks = entry["fingerprint"], entry["shape"], entry["blocks"]
        fits = (
            isinstance(entry["dtype"], str)
            and (isinstance(shape, list) and all(map(_is_count, shape)))
            and (isinstance(words, list) and len(words) == len(SEEDS))
            and all(_is_hex(_WORD, word) for word in words)
            and (isinstance(blocks, list) and all(_is_hex(_BLOCK, block) for block in blocks))
        )
        if not fits:
            raise _Malformed(f"tensor {name!r} is described by {entry!r:.200}")
        tensors[name] = TensorEntry(tuple(shape), entry["dtype"], tuple(map(_signed, words)), tuple(blocks))
    return Manifest(path, content["source"], tensors, files)


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _Malformed(f"{name} is {value!r:.100}")
    return value


def _check_keys(what: str, value: Any, wanted: tuple[str, ...]) -> None:
    if not isinstance(value, Mapping):
        raise _Malformed(f"{what} is {value!r:.100}")
    if set(value) != set(wanted):
        raise _Malformed(f"{what} has the keys {some(sorted(value), 8)}, not {', '.join(wanted)}")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_hex(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _signed(word: str) -> int:
    value = int(word, 16)
    return value - (1 << 64) if value >= 1 << 63 else value
