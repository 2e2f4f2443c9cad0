"""Exports a sharded model as a Hugging Face safetensors directory; no rank holds over one full tensor."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn import Module

from sharded_spd.checkpoint import deepspeed
from sharded_spd.checkpoint.live import quiet
from sharded_spd.checkpoint.ranks import Ranks, everyone, groups_of
from sharded_spd.engines.deepspeed import is_of_deepspeed
from sharded_spd.errors import CheckpointError
from sharded_spd.safetensors_io.writer import Entry, TensorFile


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor of the model, and how to gather it: at least on the first rank, by all ranks together."""

    entry: Entry
    gather: Callable[[], Tensor]


def export_safetensors(
    model: Module,
    directory: str | os.PathLike[str],
    *,
    names: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write the whole `model` as `model-0000K-of-0000N.safetensors` and an index, or one file. Collective.

    Tensors are gathered one after the other and written by the first rank, beside, and then renamed. `model`
    may be sharded by FSDP1, FSDP2, tensor parallelism or a DeepSpeed engine. `names`: FQN to the name in the
    files. Tied parameters are written once; FSDP1 does not tell which are, there they are written under each
    name. `group`: the ranks that export together, all of them here; None: those that the model is spread
    over (the meshes of its DTensors, FSDP1's and DDP's groups), all ranks of the job where it does not tell.
    Give it where other ranks have replicas of which the model does not tell.

    Raises:
        CheckpointError: on every rank, where the first could not write, the directory holds something, two
            tensors would have one name, one rank could not give its part, or was called with something else.
    """
    ranks = Ranks(_export_groups(model, group))
    ranks.agree(partial(_check, directory, names, max_shard_bytes), "export_safetensors")
    ranks.compare(
        operation="export_safetensors",
        directory=str(Path(directory).absolute()),
        names=sorted((names or {}).items()),
        max_shard_bytes=max_shard_bytes,
    )
    tensors = wholes(model, ranks=ranks)
    write_wholes(tensors, Path(directory), names=names, max_shard_bytes=max_shard_bytes, ranks=ranks)


def _export_groups(model: Module, group: dist.ProcessGroup | None) -> list[dist.ProcessGroup]:
    if not dist.is_initialized():
        return []
    if group is not None:
        if not isinstance(group, dist.ProcessGroup):
            raise CheckpointError(
                "group: wanted a process group that this rank is in; do not export elsewhere"
            )
        return [group]
    own = [] if is_of_deepspeed(model) else groups_of(model)
    return own or everyone()


def _check(directory: Any, names: Any, max_shard_bytes: Any) -> None:
    os.fspath(directory)
    if names is not None and not all(isinstance(text, str) for pair in names.items() for text in pair):
        raise CheckpointError("names: wanted FQNs and names, both text")
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes: got {max_shard_bytes!r}; wanted a whole number, 1 or more")


def write_wholes(
    tensors: Sequence[Whole],
    directory: Path,
    *,
    names: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    add_files: Callable[[Path], object] = lambda folder: None,
    replace: bool = False,
    ranks: Ranks | None = None,
) -> None:
    """`export_safetensors` of what `wholes` gave; `add_files` adds others to the folder. Collective.

    `replace`: what is in `directory` is dropped once the new files are there. `ranks`: None is all of the
    job. A rank other than the first may come without tensors where there is nothing to gather.
    """
    ranks = Ranks(everyone()) if ranks is None else ranks
    named = ranks.agree(partial(_in_files, tensors, names or {}), "names")
    writer = _FirstRank(ranks.first)
    part = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.part")
    files = _share_out(tensors, max_shard_bytes)
    writer.attempt(partial(_prepare, part, directory, replace=replace))
    for number, own in enumerate(files, start=1):
        entries = [Entry(named[t.entry.name], t.entry.dtype, t.entry.shape) for t in own]
        writer.open(part / _file_name(number, len(files)), entries)
        for tensor in own:
            writer.append(tensor.gather)
        writer.close()
    if len(files) > 1:
        writer.attempt(partial(_write_index, part, files, named))
    writer.attempt(partial(add_files, part))
    try:
        ranks.agree(partial(writer.tell, directory), "export")
        writer.attempt(partial(_put, part, directory, replace=replace))
        ranks.agree(partial(writer.tell, directory), "export")
    except Exception:
        if ranks.first:
            shutil.rmtree(part, ignore_errors=True)
        raise


def _in_files(tensors: Sequence[Whole], names: Mapping[str, str]) -> dict[str, str]:
    """The name in the files of each tensor."""
    named = {t.entry.name: names.get(t.entry.name, t.entry.name) for t in tensors}
    repeated = [name for name, count in Counter(named.values()).items() if count > 1]
    if repeated:
        raise CheckpointError(f"names: {min(repeated)!r} stands for several tensors; wanted one name each")
    if "__metadata__" in named.values():
        raise CheckpointError("names: '__metadata__' is what a safetensors file calls its header's notes")
    return named


class _FirstRank:
    """Actions of the first rank only, and none after a failure: it still gathers with the others.

    So does any other rank, whose failure to gather is kept until `tell`.
    """

    def __init__(self, mine: bool) -> None:
        self.failure: Exception | None = None
        self._mine = mine
        self._file: TensorFile | None = None

    def attempt(self, action: Callable[[], object]) -> None:
        if self._mine and self.failure is None:
            try:
                action()
            except Exception as error:  # raised by `tell`, on every rank
                self.failure = error

    def open(self, path: Path, entries: Sequence[Entry]) -> None:
        def make() -> None:
            self._file = TensorFile(path, entries)

        self.attempt(make)

    def append(self, gather: Callable[[], Tensor]) -> None:
        try:
            whole = gather()
        except Exception as error:
            self.failure = self.failure or error
            return
        if self._file is not None:
            self.attempt(partial(self._file.append, whole))

    def close(self) -> None:
        if self._file is not None:
            self.attempt(self._file.close)

    def tell(self, directory: Path) -> None:
        if self.failure is not None:
            raise CheckpointError(f"{directory}: nothing was exported: {self.failure}")


def _prepare(part: Path, directory: Path, *, replace: bool) -> None:
    if directory.exists() and any(directory.iterdir()) and not replace:
        raise FileExistsError(17, "holds something already", str(directory))
    part.mkdir(parents=True)
    # Leftovers of killed exports; a concurrent export into the same directory fails.
    old = re.compile(rf"\.{re.escape(directory.name)}(\.[0-9a-f]{{8}})?\.part")
    for left in part.parent.iterdir():
        if left != part and old.fullmatch(left.name):
            shutil.rmtree(left, ignore_errors=True)


def _put(part: Path, directory: Path, *, replace: bool) -> None:
    if replace and directory.exists():
        shutil.rmtree(directory)
    os.rename(part, directory)  # replaces an empty one; fails if another export was faster


def wholes(model: Module, *, ranks: Ranks | None = None) -> list[Whole]:
    """Every parameter and saved buffer of a model, those of a tied parameter once. Collective.

    `ranks`: None is all of the job.
    """
    ranks = Ranks(everyone()) if ranks is None else ranks
    if is_of_deepspeed(model):
        found = ranks.agree(lambda: list(deepspeed.wholes(model)), "the model's tensors")
        return [Whole(Entry(n, dtype, shape), gather) for n, dtype, shape, gather in found]

    def state_of() -> dict[str, Any]:
        with quiet():
            return dict(get_model_state_dict(model))

    state = ranks.agree(state_of, "the model's state")
    seen: dict[tuple[Any, ...], str] = {}
    repeated: dict[str, None] = {}
    for name, tensor in state.items():
        local = _local(tensor)
        if local is not None and local.numel():
            memory = (local.data_ptr(), tensor.size(), local.stride(), local.dtype)
            if seen.setdefault(memory, name) != name:
                repeated[name] = None
    # A rank that holds nothing of a tensor cannot know.
    names = ranks.union(repeated)
    described = [(n, t.dtype, tuple(t.size())) for n, t in state.items() if hasattr(t, "dtype")]
    ranks.compare(tensors=described)
    return [
        Whole(Entry(name, tensor.dtype, tuple(tensor.size())), partial(_gather, tensor))
        for name, tensor in state.items()
        if name not in names and isinstance(tensor, (Tensor, ShardedTensor))
    ]


def at_hand(name: str, tensor: Tensor) -> Whole:
    """A tensor that is not sharded."""
    return Whole(Entry(name, tensor.dtype, tuple(tensor.shape)), partial(_gather, tensor))


def _local(tensor: Any) -> Tensor | None:
    if isinstance(tensor, ShardedTensor):
        shards = tensor.local_shards()
        return shards[0].tensor if shards else None
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return tensor if isinstance(tensor, Tensor) else None


@torch.no_grad()
def _gather(tensor: Any) -> Tensor:
    if isinstance(tensor, DTensor):
        # Offloaded tensors are gathered on the device that the group works on.
        there: Any = tensor.to(tensor.device_mesh.device_type)
        whole: Tensor = there.full_tensor()
        return whole
    if not isinstance(tensor, ShardedTensor):
        return torch.as_tensor(tensor)
    # FSDP1 shards along the first dim, so the shards are consecutive in the flattened tensor.
    parts: list[Any] = sorted(tensor.metadata().shards_metadata, key=lambda part: part.shard_offsets)
    sizes = {part.placement.rank(): math.prod(part.shard_sizes) for part in parts}
    local = _local(tensor)
    own = torch.zeros(max(sizes.values(), default=0), dtype=tensor.dtype, device=_device(local))
    if local is not None:
        own[: local.numel()] = local.reshape(-1)
    group = tensor._process_group
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    return torch.cat([gathered[rank][: sizes[rank]] for rank in sizes]).view(tensor.size())


def _device(local: Tensor | None) -> torch.device:
    if local is not None:
        return local.device
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def _share_out(tensors: Sequence[Whole], limit: int) -> list[list[Whole]]:
    """Consecutive tensors by file, none larger than `limit` unless one tensor is."""
    files: list[list[Whole]] = [[]]
    size = 0
    for tensor in tensors:
        if files[-1] and size + tensor.entry.num_bytes > limit:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.entry.num_bytes
    return files


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _write_index(folder: Path, files: Sequence[Sequence[Whole]], names: Mapping[str, str]) -> None:
    weight_map = {
        names[t.entry.name]: _file_name(number, len(files))
        for number, own in enumerate(files, start=1)
        for t in own
    }
    size = sum(t.entry.num_bytes for own in files for t in own)
    content = {"metadata": {"total_size": size}, "weight_map": weight_map}
    text = json.dumps(content, indent=2, sort_keys=True)
    (folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
