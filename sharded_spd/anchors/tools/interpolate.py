"""A checkpoint between two others, made file by file with one chunk of one tensor in memory at a time."""

from __future__ import annotations

import glob
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from sharded_spd.anchors.checkpoint import Checkpoint
from sharded_spd.anchors.paths import some
from sharded_spd.anchors.tools.beside import Companions, companions
from sharded_spd.anchors.tools.lineage import Origin, write_record
from sharded_spd.anchors.tools.scan import Progress, chunks
from sharded_spd.anchors.tools.tied import match_tied
from sharded_spd.errors import AnchorError
from sharded_spd.safetensors_io.reader import FLOATS, StoredTensor, read_piece
from sharded_spd.safetensors_io.writer import RawEntry, TensorFile
from sharded_spd.sharding.layout import FlatRange
from sharded_spd.sharding.names import match_names

_CHUNK = 1 << 19  # elements; with float64 copies of both ends 12 MiB
_WHOLE = re.compile(r"[IU]\d+|BOOL")
"""Kinds between two values of which nothing lies; they are the second checkpoint's."""


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
    beside: Companions
    origin: Origin

    @property
    def kept(self) -> list[str]:
        """The tensors that are the second checkpoint's own at every alpha, weights first."""
        kept = sorted((pair.end for pair in self.pairs if pair.start is None), key=lambda t: t.dtype is None)
        return [tensor.name for tensor in kept]

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
            and integers.

    Raises:
        AnchorError: a checkpoint is damaged, they share no tensor, a pattern fits none, a shape differs, or a
            tensor is of another kind (FP8, complex) and not among `keep`.
    """
    first, second = Checkpoint(start), Checkpoint(end)
    names = match_names(list(second.files()), first.files())
    names.update(match_tied(first, second, names))
    unused = [p for p in keep if not any(fnmatchcase(name, p) for name in second.files())]
    if unused:
        raise AnchorError(f"keep: {some(unused)} fits no tensor of {end}")
    pairs, other, unmixable = [], [], []
    for key in second.files():
        tensor = second.tensor(key)
        stays = key not in names or any(fnmatchcase(key, p) for p in keep)
        stays = stays or _WHOLE.fullmatch(tensor.stored_as) is not None
        found = None if stays else first.tensor(names[key])
        pairs.append(Pair(tensor, found))
        if found is None:
            continue
        if tensor.dtype is None:
            unmixable.append(f"{key} is {tensor.stored_as}")
        elif found.dtype is None or found.shape != tensor.shape:
            other.append(
                f"{key} is {found.stored_as} {list(found.shape)} there, "
                f"{tensor.stored_as} {list(tensor.shape)} here"
            )
    way_out = "keep=PATTERN (--keep PATTERN) takes the second checkpoint's as they are"
    if unmixable:
        raise AnchorError(
            f"{end}: {len(unmixable)} tensor(s) are of a kind that is not mixed ({'; '.join(unmixable[:3])})"
            f"; wanted one of {', '.join(FLOATS)}; {way_out}"
        )
    if other:
        raise AnchorError(
            f"{start} and {end}: {len(other)} tensor(s) differ in shape or kind ({'; '.join(other[:3])}): "
            f"nothing lies between them; {way_out}"
        )
    if all(pair.start is None for pair in pairs):
        raise AnchorError(f"{start} and {end}: share no floating-point tensor: two different models?")
    taken, beside = set(names.values()), companions(second)
    files = [*map(Path, second.files().values()), *(second.folder / name for name in beside.taken)]
    origin = Origin.of((first.root, first.files().values()), (second.root, files), keep)
    left_out = [key for key in first.files() if key not in taken]
    return Plan(first, second, pairs, left_out, beside, origin)


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

    Beside the tensors it holds what belongs to the second checkpoint (`companions`), and a record of what
    it is (`lineage`). Written beside and renamed: `target` is there whole or not at all.

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
    _clear_stale(beside.parent, folder.name)
    try:
        beside.mkdir(parents=True)
        for name in found.beside.taken:
            (beside / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(found.end.folder / name, beside / name)
        for path, pairs in files.items():
            to = beside / found.end.relative(path)
            to.parent.mkdir(parents=True, exist_ok=True)
            _write_file(to, pairs, alpha, progress)
        write_record(beside, found.origin, alpha)
        os.rename(beside, folder)
    except OSError as error:
        raise AnchorError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _clear_stale(parent: Path, name: str) -> None:
    """Remove what processes that were killed while they wrote this folder have left of it."""
    for path in parent.glob(f".{glob.escape(name)}.*"):
        pid = path.name.removeprefix(f".{name}.")
        # This process's own number, too: in a container it is the same after each start.
        if pid.isdecimal() and (int(pid) == os.getpid() or not _runs(int(pid))):
            shutil.rmtree(path, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's, or no process's number at all
        pass
    return True


def _write_file(path: Path, pairs: Sequence[Pair], alpha: float, progress: Progress | None) -> None:
    # Wide elements first, so that all lie aligned.
    ordered = sorted(pairs, key=lambda pair: -pair.end.num_bytes / max(1, math.prod(pair.end.shape)))
    ends = [pair.end for pair in ordered]
    entries = [RawEntry(end.name, end.stored_as, end.shape, end.num_bytes) for end in ends]
    with TensorFile(path, entries, {"format": "pt"}) as file:
        for pair in ordered:
            for part in _parts(pair, alpha):
                file.append(part)
                if progress is not None:
                    progress(part.numel() * part.element_size())


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
