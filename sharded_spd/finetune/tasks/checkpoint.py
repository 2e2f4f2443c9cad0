"""Hugging Face checkpoint directories: checked before they are used, written beside and renamed."""

from __future__ import annotations

import importlib
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from sharded_spd.anchors.base import Cast, Values, VouchedStore, is_on_disk
from sharded_spd.anchors.files import FileAnchor
from sharded_spd.anchors.memory import take_region
from sharded_spd.checkpoint.export import Whole, at_hand, write_wholes
from sharded_spd.errors import AnchorError, ConfigError
from sharded_spd.finetune.tasks.packaged import PACKAGE, folder_of_package
from sharded_spd.sharding.layout import ShardSlice

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def check_checkpoint(source: str, revision: str | None = None) -> Path:
    """The directory of the checkpoint `source`, which is one in safetensors, or a name of the hub (org/name).

    A name is looked up in the hub's local cache, and fetched where it is not there and there is a network.
    `package:NAME/FOLDER` is a folder of an installed Python package.

    Raises:
        ConfigError: there is none, or it lacks its configuration or its weights.
    """
    if source.startswith(PACKAGE):
        directory = folder_of_package(source.removeprefix(PACKAGE))
    else:
        directory = Path(source)
    if not directory.is_dir() and _HUB_NAME.fullmatch(source) and not directory.exists():
        directory = _from_hub(source, revision)
    if not directory.is_dir():
        raise ConfigError(
            f"checkpoint: there is no directory {source} (relative paths start at {Path.cwd()})"
        )
    if not (directory / "config.json").is_file():
        raise ConfigError(f"checkpoint: {source} has no config.json, so it is no Hugging Face checkpoint")
    if not weight_files(directory):
        raise ConfigError(
            f"checkpoint: {source} has no *.safetensors file; only safetensors weights are read"
        )
    return directory


def _from_hub(name: str, revision: str | None) -> Path:
    fetch = partial(importlib.import_module("huggingface_hub").snapshot_download, name, revision=revision)
    try:
        return Path(fetch(local_files_only=True))
    except (OSError, ValueError):
        pass
    try:
        return Path(fetch(allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]))
    except Exception as error:  # many kinds: no network, no such name, no access
        text = " ".join(str(error).split())
        raise ConfigError(
            f"checkpoint: {name} is no directory (relative paths start at {Path.cwd()}), is not in the hub's "
            f"local cache, and could not be fetched: {text:.200}"
        ) from None


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of its index, or all of them."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [directory / name for name in sorted(names)]
    return sorted(directory.glob("*.safetensors"))


def stored_names(directory: Path) -> list[str]:
    """The names of the tensors in a checkpoint's files, read from their headers."""
    names: list[str] = []
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt") as opened:
                names += opened.keys()
        except (OSError, SafetensorError) as error:
            raise AnchorError(f"{file} cannot be read as safetensors: {error}") from None
    return names


def names_in_checkpoint(model: nn.Module, directory: Path) -> dict[str, str]:
    """Which stored tensor each parameter of `model` was loaded from, by the parameter's FQN.

    transformers renames tensors when it loads some architectures, so the file has other names than the model.
    A parameter that the checkpoint lacks, or that is made of several stored tensors, is not in the result.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    stored = stored_names(directory)
    found = {name: name for name in stored if name in parameters}
    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:
        return found
    loading = importlib.import_module("transformers.core_model_loading")
    renamings = [t for t in transforms if isinstance(t, loading.WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
    shapes = dict(model.state_dict())
    for name in stored:
        fqn, converter = loading.rename_source_key(
            name, renamings, converters, getattr(model, "base_model_prefix", ""), shapes
        )
        if converter is None and fqn in parameters:
            found.setdefault(fqn, name)
    return found


@dataclass(frozen=True)
class RenamedAnchor:
    """An anchor store whose layers have other names than the model's: `names` maps FQN to stored name.

    Layers of `own` are anchored at these whole tensors instead.
    """

    inner: VouchedStore
    names: Mapping[str, str]
    own: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """What the values are: the same as without the renaming."""
        return self.inner.source

    @property
    def on_disk(self) -> bool:
        """Whether the values stay in their files."""
        return is_on_disk(self.inner)

    def problems(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """One sentence per layer that the store cannot serve with that full shape."""
        stored = {self._name(fqn): shape for fqn, shape in shapes.items() if fqn not in self.own}
        found = self.inner.problems(stored)
        for note in self.inner.notes(stored) if isinstance(self.inner, FileAnchor) and not found else ():
            warnings.warn(note, stacklevel=2)
        return found

    def fetch(self, piece: ShardSlice) -> Values | None:
        """The values of `piece`, under the name that the file has for its layer."""
        if piece.layer in self.own:
            return take_region(self.own[piece.layer], piece)
        return self.inner.fetch(replace(piece, layer=self._name(piece.layer)))

    def expected(self, layer: str) -> tuple[int, ...] | None:
        """The fingerprint that the layer's stored values ought to have."""
        return None if layer in self.own else self.inner.expected(self._name(layer))

    def expected_overall(self) -> str | None:
        """The fingerprint that all that is stored ought to have together."""
        return self.inner.expected_overall()

    def cast(self, layer: str) -> Cast | None:
        """What the last `fetch` of the layer did to its values."""
        return None if layer in self.own else self.inner.cast(self._name(layer))

    def _name(self, fqn: str) -> str:
        return self.names.get(fqn, fqn)


def save_checkpoint(
    model_class: type[Any],
    config: Any,
    tensors: Sequence[Whole],
    directory: Path,
    *,
    add_files: Callable[[Path], object],
) -> None:
    """Write a Hugging Face checkpoint that `from_pretrained` loads, to a temporary folder, then rename it.

    One tensor is gathered at a time, unless the architecture is stored with tensors that its model has merged
    or cut: then the first rank gathers all. `add_files` puts the preprocessing beside them. Collective.

    Raises:
        CheckpointError: on every rank, where the first could not write.
    """
    with torch.device("meta"):
        model = model_class(config)
    names = _stored_as(model, [t.entry.name for t in tensors])
    if names is None:
        tensors = _converted(model, tensors)
    add = partial(_add_files, model, add_files)
    write_wholes(tensors, directory, names=names, add_files=add, replace=True)


def _stored_as(model: Any, fqns: Sequence[str]) -> dict[str, str] | None:
    """The name under which each tensor is stored; None where the model's tensors are not the stored ones."""
    placeholders = {fqn: torch.empty(0, device="meta") for fqn in fqns}
    try:
        loading = importlib.import_module("transformers.core_model_loading")
    except ModuleNotFoundError:  # an older one, which stores tensors as its models have them
        return {}
    try:
        reverted = loading.revert_weight_conversion(model, dict(placeholders))
    except Exception:  # an operation on placeholders that have no such shape
        return None
    stored = {id(tensor): name for name, tensor in reverted.items()}
    if len(reverted) != len(fqns) or any(id(tensor) not in stored for tensor in placeholders.values()):
        return None
    return {fqn: stored[id(tensor)] for fqn, tensor in placeholders.items()}


def _converted(model: Any, tensors: Sequence[Whole]) -> list[Whole]:
    """The tensors as they are stored, all on the first rank's CPU. Collective."""
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    whole: dict[str, torch.Tensor] = {}
    for tensor in tensors:
        gathered = tensor.gather()
        if first:
            whole[tensor.entry.name] = gathered.detach().cpu().clone()
    loading = importlib.import_module("transformers.core_model_loading")
    stored = loading.revert_weight_conversion(model, whole) if first else {}
    return [at_hand(name, tensor) for name, tensor in stored.items()]


def _add_files(model: Any, add_files: Callable[[Path], object], folder: Path) -> None:
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(folder)
    add_files(folder)
