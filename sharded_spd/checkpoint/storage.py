"""Storage for torch.distributed.checkpoint without pickle: safetensors per rank and one JSON file.

torch's own storage keeps its metadata, and everything that is no tensor, as pickles.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from sharded_spd.checkpoint.folder import (
    check_complete,
    finish_folder,
    prune,
    read_json,
    start_folder,
    write_json,
)
from sharded_spd.errors import CheckpointError
from sharded_spd.safetensors_io.writer import DTYPES, Entry, TensorFile

METADATA = "metadata.json"
_FILE = re.compile(r"rank\d{5}\.safetensors")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


class Writer(StorageWriter):
    """Writes one checkpoint folder: each rank its file, the coordinator the rest; finally renames it.

    `values` is what the folder holds beside the tensors, `facts` what its marker says, `keep` how many
    checkpoints stay (None: all), `part` the folder to write into where it was made already. Only the
    coordinator's count.
    """

    def __init__(
        self, final: Path, values: Any, facts: Mapping[str, Any], keep: int | None, part: Path | None = None
    ) -> None:
        self._final, self._values, self._facts, self._keep = final, values, dict(facts), keep
        self._part = part

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is carried over from one save to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the folder, on the coordinator, and send its path to every rank."""
        self._part = self._part or start_folder(self._final)
        return [replace(plan, storage_data=(str(self._part), rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's tensors, one after the other, into its file."""
        part, rank = plan.storage_data
        name = f"rank{rank:05d}.safetensors"
        results = _write_items(Path(part) / name, plan.items, planner) if plan.items else []
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write all but the tensors, mark the folder complete, and rename it; on the coordinator."""
        part = self._part or start_folder(self._final)
        places = {result.index: result.storage_data for own in results for result in own}
        tensors = {}
        described: Mapping[str, Any] = metadata.state_dict_metadata
        for fqn, stored in described.items():
            chunks = [
                {
                    "offsets": list(chunk.offsets),
                    "sizes": list(chunk.sizes),
                    "file": places[MetadataIndex(fqn, chunk.offsets)][0],
                    "name": places[MetadataIndex(fqn, chunk.offsets)][1],
                }
                for chunk in stored.chunks
                if math.prod(chunk.sizes) > 0
            ]
            dtype = str(stored.properties.dtype).removeprefix("torch.")
            tensors[fqn] = {"dtype": dtype, "shape": list(stored.size), "chunks": chunks}
        write_json(part / METADATA, {"values": self._values, "tensors": tensors})
        finish_folder(part, self._final, self._facts)
        if self._keep is not None:
            prune(self._final, self._facts["step"], self._keep)

    def clean_up(self) -> None:
        """Remove the files of a failed save."""
        if self._part is not None:
            shutil.rmtree(self._part, ignore_errors=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Paths."""
        return True


class StagedPlanner(DefaultSavePlanner):
    """Saves the tensors as of its construction, from copies on the host.

    torch's own staging knows no ShardedTensor, which FSDP1 has.
    """

    def __init__(self, tensors: dict[str, Any]) -> None:
        super().__init__(dedup_save_to_lowest_rank=True)
        self.set_up_planner(tensors, is_coordinator=True)  # with arguments that are the same on all ranks
        self._copies: dict[MetadataIndex, torch.Tensor] = {}
        for item in create_default_local_save_plan(self.state_dict, True).items:
            tensor = self.lookup_object(item.index).detach()
            self._copies[item.index] = torch.empty_like(tensor, device="cpu").copy_(tensor)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The copy; released once it is written."""
        return self._copies.pop(write_item.index)


class Reader(StorageReader):
    """Reads the tensors of a checkpoint folder; from other ranks' files, only the slices needed."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        self._folder, self._metadata = folder, metadata

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is carried over from one load to the next."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The result of `read_metadata`."""
        return self._metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the plan's items into the planner's tensors."""
        by_file = defaultdict(list)
        for item in plan.items:
            file, name = self._metadata.storage_data[item.storage_index]
            by_file[file].append((name, item))
        for file, wanted in by_file.items():
            try:
                with safe_open(self._folder / file, framework="pt") as opened:
                    for name, item in wanted:
                        target = planner.resolve_tensor(item).detach()
                        target.copy_(_read(opened, name, item.storage_offsets, item.lengths))
                        planner.commit_tensor(item, target)
            except (OSError, SafetensorError, ValueError, IndexError) as error:
                raise CheckpointError(f"{self._folder / file}: is damaged: {error}") from None
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Paths."""
        return True


def read_metadata(folder: Path) -> tuple[Metadata, Any]:
    """The contents of a checkpoint folder: its tensors, for `Reader`, and the values beside them.

    Raises:
        CheckpointError: for what `Writer` would not have written; no file outside of the folder is named.
    """
    path = folder / METADATA
    content = read_json(path)
    found: dict[str, Any] = {}
    places: dict[MetadataIndex, tuple[str, str]] = {}
    try:
        for fqn, entry in content["tensors"].items():
            size, dtype = _numbers(entry["shape"]), _DTYPES[entry["dtype"]]
            chunks = []
            for chunk in entry["chunks"]:
                offsets, sizes = _numbers(chunk["offsets"]), _numbers(chunk["sizes"])
                if not _FILE.fullmatch(chunk["file"]) or not isinstance(chunk["name"], str):
                    raise ValueError(f"{chunk['file']!r:.100} is no file of a checkpoint")
                if not len(offsets) == len(sizes) == len(size) or any(
                    o + n > whole for o, n, whole in zip(offsets, sizes, size, strict=True)
                ):
                    raise ValueError(f"a part of {fqn!r} lies outside of it")
                chunks.append(ChunkStorageMetadata(offsets, sizes))
                places[MetadataIndex(fqn, offsets)] = (chunk["file"], chunk["name"])
            if sum(math.prod(c.sizes) for c in chunks) != math.prod(size):
                raise ValueError(f"the parts of {fqn!r} do not add up to it")
            found[fqn] = TensorStorageMetadata(TensorProperties(dtype), size, chunks)
        values = content["values"]
        if not isinstance(values, dict):
            raise TypeError("the values are no object")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path}: is damaged: {type(error).__name__}: {error}") from None
    return Metadata(found, storage_data=places), values


def check_folder(folder: Path) -> dict[str, Any]:
    """The marker of a complete checkpoint, with files checked against its metadata by their headers.

    Raises:
        CheckpointError: it is not complete, or damaged.
    """
    marker = check_complete(folder)
    metadata, _ = read_metadata(folder)
    wanted: dict[str, dict[str, list[int]]] = defaultdict(dict)
    described: Mapping[str, Any] = metadata.state_dict_metadata
    for fqn, stored in described.items():
        for chunk in stored.chunks:
            file, name = metadata.storage_data[MetadataIndex(fqn, chunk.offsets)]
            wanted[file][name] = list(chunk.sizes)
    for file, shapes in wanted.items():
        try:
            with safe_open(folder / file, framework="pt") as opened:
                there = set(opened.keys())
                for name, shape in shapes.items():
                    if name not in there or list(opened.get_slice(name).get_shape()) != shape:
                        raise ValueError(f"tensor {name!r} is not there in shape {shape}")
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{folder / file}: is damaged: {error}") from None
    return marker


def _numbers(value: Any) -> torch.Size:
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in value):
        raise ValueError(f"wanted a list of sizes, got {value!r:.100}")
    return torch.Size(value)


def _read(opened: Any, name: str, offsets: torch.Size, lengths: torch.Size) -> torch.Tensor:
    if not lengths:
        whole: torch.Tensor = opened.get_tensor(name)
        return whole
    window = tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))
    part: torch.Tensor = opened.get_slice(name)[window]
    if part.shape != lengths:
        raise ValueError(f"tensor {name!r} is smaller than {METADATA} says")
    return part


def _write_items(path: Path, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
    entries, results = [], []
    for item in items:
        if item.tensor_data is None:
            raise CheckpointError(f"{item.index.fqn}: is no tensor")
        chunk, dtype = item.tensor_data.chunk, item.tensor_data.properties.dtype
        name = f"{item.index.fqn}@{','.join(map(str, chunk.offsets))}"
        entries.append(Entry(name, dtype, tuple(chunk.sizes)))
        results.append(WriteResult(item.index, entries[-1].num_bytes, (path.name, name)))
    with TensorFile(path, entries) as file:
        for item in items:
            tensor: Any = planner.resolve_data(item)
            file.append(tensor)
    return results
