"""A checkpoint between two others, made file by file with one chunk of one tensor in memory at a time."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from sharded_spd.anchors.checkpoint import INDEX, Checkpoint
from sharded_spd.anchors.manifest import MANIFEST
from sharded_spd.anchors.paths import some
from sharded_spd.anchors.reader import StoredTensor, read_piece
from sharded_spd.anchors.scan import Progress, chunks
from sharded_spd.errors import AnchorError
from sharded_spd.layout import FlatRange
from sharded_spd.names import match_names
from sharded_spd.tensorfile import DTYPES, Entry, TensorFile

_CHUNK = 1 << 19  # elements; with float64 copies of both ends 12 MiB
_STORED_AS = {name: dtype for dtype, name in DTYPES.items()}
_WEIGHTS = (
    ".safetensors",
    INDEX,
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
)


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor of the second checkpoint, and that of the first one which it is mixed with; None: it stays."""

    end: StoredTensor
    start: StoredTensor | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of each tensor; `left_out`: those of the first checkpoint that the second one lacks."""

    start: Checkpoint
    end: Checkpoint
    pairs: Sequence[Pair]
    left_out: Sequence[str]

    @property
    def kept(self) -> list[str]:
        """The tensors that are the second checkpoint's own at every alpha."""
        return [pair.end.name for pair in self.pairs if pair.start is None]

    @property
    def num_bytes(self) -> int:
        """How much one checkpoint takes."""
        return sum(pair.end.num_bytes for pair in self.pairs)


def plan(start: str, end: str, *, keep: Sequence[str] = ()) -> Plan:
    """Match the tensors of two checkpoints by name, as an anchor's are.

    Args:
        start: the pre-trained checkpoint: a file, an index, a directory, or a name in the hub's cache.
        end: the fine-tuned one, whose names, dtypes and files the result has.
        keep: patterns of tensors that stay as they are in `end`, as do those that `start` lacks (new heads)
            and those that are not floating point.

    Raises:
        AnchorError: a checkpoint is damaged, they share no tensor, a pattern fits none, or a shape differs.
    """
    first, second = Checkpoint(start), Checkpoint(end)
    names = match_names(list(second.files()), first.files())
    unused = [p for p in keep if not any(fnmatchcase(name, p) for name in second.files())]
    if unused:
        raise AnchorError(f"keep: {some(unused)} fits no tensor of {end}")
    pairs, other = [], []
    for key in second.files():
        tensor = second.tensor(key)
        stays = key not in names or tensor.dtype is None or any(fnmatchcase(key, p) for p in keep)
        found = None if stays else first.tensor(names[key])
        pairs.append(Pair(tensor, found))
        if found is not None and (found.dtype is None or found.shape != tensor.shape):
            other.append(
                f"{key} is {found.stored_as} {list(found.shape)} there, "
                f"{tensor.stored_as} {list(tensor.shape)} here"
            )
    if other:
        raise AnchorError(
            f"{start} and {end}: {len(other)} tensor(s) differ in shape or kind ({'; '.join(other[:3])}): "
            "nothing lies between them; keep=PATTERN takes the second checkpoint's as they are"
        )
    if all(pair.start is None for pair in pairs):
        raise AnchorError(f"{start} and {end}: share no floating-point tensor: two different models?")
    taken = set(names.values())
    return Plan(first, second, pairs, [key for key in first.files() if key not in taken])


def between(start: Tensor, end: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) * start + alpha * end in float64 (WiSE-FT, Wortsman et al. 2022); exact at 0 and 1."""
    if alpha in (0, 1):
        return end if alpha else start
    a, b = start.double(), end.double()
    return a + alpha * (b - a)


def write(
    found: Plan, target: str | os.PathLike[str], alpha: float, progress: Progress | None = None
) -> Path:
    """Write the checkpoint at `alpha` (0: the first one, 1: the second) to the new directory `target`.

    Beside the tensors it holds what the second checkpoint's directory does: configuration, tokenizer. Written
    beside and renamed: `target` is there whole or not at all.

    Raises:
        AnchorError: `alpha` is not finite, `target` exists, cannot be written, or a file changed meanwhile.
    """
    if not math.isfinite(alpha):
        raise AnchorError(f"alpha: wanted a finite number, got {alpha}")
    folder = Path(target)
    if folder.exists() or folder.is_symlink():
        raise AnchorError(f"{folder}: exists already; name a new directory, or remove it first")
    beside = folder.absolute().with_name(f".{folder.name}.{os.getpid()}")
    files: dict[str, list[Pair]] = {}
    for pair in found.pairs:
        files.setdefault(pair.end.path, []).append(pair)
    try:
        beside.mkdir(parents=True)
        _copy_others(found.end, beside)
        for path, pairs in files.items():
            to = beside / found.end.relative(path)
            to.parent.mkdir(parents=True, exist_ok=True)
            _write_file(to, pairs, alpha, progress)
        os.rename(beside, folder)
    except OSError as error:
        raise AnchorError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _copy_others(end: Checkpoint, to: Path) -> None:
    """The files beside the weights, and the index, which stays true: no name, shape or dtype changes."""
    for path in sorted(end.folder.iterdir()):
        is_index = path.name.endswith(INDEX) and (end.root.is_dir() or path == end.root)
        if path.is_file() and (is_index or not (path.name.endswith(_WEIGHTS) or path.name == MANIFEST)):
            shutil.copyfile(path, to / path.name)


def _write_file(path: Path, pairs: Sequence[Pair], alpha: float, progress: Progress | None) -> None:
    entries = {pair.end.name: _entry(pair.end) for pair in pairs}
    # Wide elements first, so that all lie aligned.
    ordered = sorted(pairs, key=lambda pair: -entries[pair.end.name].dtype.itemsize)
    with TensorFile(path, [entries[pair.end.name] for pair in ordered], {"format": "pt"}) as file:
        for pair in ordered:
            for part in _parts(pair, alpha):
                file.append(part)
                if progress is not None:
                    progress(part.numel() * part.element_size())


def _entry(tensor: StoredTensor) -> Entry:
    if tensor.stored_as not in _STORED_AS:
        raise AnchorError(
            f"{tensor.path}: {tensor.name!r} is {tensor.stored_as}; wanted one of {', '.join(_STORED_AS)}"
        )
    return Entry(tensor.name, _STORED_AS[tensor.stored_as], tensor.shape)


def _parts(pair: Pair, alpha: float) -> Iterator[Tensor]:
    """The result's elements in order."""
    end, start = pair.end, pair.start
    if start is None or end.dtype is None:
        for _, data in chunks(end):
            yield torch.frombuffer(data, dtype=torch.uint8)
        return
    numel = math.prod(end.shape)
    for begin in range(0, numel, _CHUNK):
        count, where = min(_CHUNK, numel - begin), FlatRange(begin)
        a, b = (read_piece(t, where, numel=count) for t in (start, end))
        yield between(a, b, alpha).to(end.dtype)


def parse_alphas(text: str) -> list[float]:
    """The numbers of "0.5", "0,0.3,1" or "0:1:0.1" (both ends included).

    Raises:
        AnchorError: it is none of these.
    """
    wanted = f"alpha: wanted a number, numbers with commas, or first:last:step, got {text!r}"
    try:
        parts = [float(part) for part in text.split(":")] if ":" in text else []
        numbers = [] if parts else [float(part) for part in text.split(",")]
    except ValueError:
        raise AnchorError(wanted) from None
    if parts:
        if len(parts) != 3 or not all(map(math.isfinite, parts)) or parts[2] <= 0 or parts[1] < parts[0]:
            raise AnchorError(wanted)
        first, last, step = parts
        count = math.floor((last - first) / step + 1e-9) + 1
        if count > 1000:
            raise AnchorError(f"alpha: {text} is {count} checkpoints; wanted at most 1000")
        numbers = [round(first + i * step, 10) for i in range(count)]
    if not numbers or not all(map(math.isfinite, numbers)) or len(set(numbers)) < len(numbers):
        raise AnchorError(f"{wanted}; each finite and none twice")
    return numbers


def folder_of(output: str | os.PathLike[str], alpha: float) -> Path:
    """Where the checkpoint of one alpha goes: `output/alpha-0.3`."""
    return Path(output) / f"alpha-{alpha:.10g}"
