"""Models of Hugging Face checkpoints: whole by from_pretrained, or empty, to be filled shard by shard."""

from __future__ import annotations

import copy
import hashlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sharded_spd.anchors.checkpoint import Checkpoint
from sharded_spd.errors import AnchorError, ConfigError
from sharded_spd.finetune.tasks.checkpoint import names_in_checkpoint
from sharded_spd.safetensors_io.reader import read_piece
from sharded_spd.sharding.layout import Box, FlatRange


@dataclass(frozen=True)
class Loaded:
    """A model, whole or empty (its parameters on the meta device).

    `names`: which stored tensor each parameter comes from. `added`: the values of those that the checkpoint
    lacks. `whole`: whether the parameters have their values.
    """

    model: nn.Module
    names: Mapping[str, str]
    added: Mapping[str, torch.Tensor]
    whole: bool


@dataclass(frozen=True)
class Kind:
    """What a saved model is: its class and configuration, and peft's of an adapter."""

    model_class: type[Any]
    config: Any
    adapter: Any = None

    @classmethod
    def of(cls, model: Any) -> Kind:
        """That of a model which no engine has wrapped yet."""
        if not hasattr(model, "peft_config"):
            return cls(type(model), model.config)
        base = model.get_base_model()
        return cls(type(base), base.config, model.peft_config["default"])


def load_whole(auto: Any, directory: Path, config: Any, *, new_head: bool, seed: int, trust: bool) -> Loaded:
    """The model in float32; what a new head adds is drawn by `seed` and its name.

    Raises:
        ConfigError: transformers cannot load it, or the checkpoint lacks more than a new head.
    """
    try:
        model, info = auto.from_pretrained(
            directory,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=trust,
            dtype=torch.float32,
        )
    except (ValueError, OSError, KeyError, RuntimeError, ImportError) as error:
        raise ConfigError(f"checkpoint: {directory} cannot be loaded by {auto.__name__}: {error}") from None
    mismatched = {
        entry[0] if isinstance(entry, (tuple, list)) else entry for entry in info["mismatched_keys"]
    }
    own = {name for name, _ in model.named_parameters()}
    missing = sorted(({*info["missing_keys"]} | mismatched) & own)
    _check_missing(model, missing, directory, new_head=new_head)
    added = draw(model, missing, seed=seed)
    with torch.no_grad():
        for name, values in added.items():
            model.get_parameter(name).copy_(values)
    names = {fqn: key for fqn, key in names_in_checkpoint(model, directory).items() if fqn not in added}
    return Loaded(model, names, added, whole=True)


def load_empty(
    auto: Any, directory: Path, config: Any, *, new_head: bool, seed: int, trust: bool
) -> Loaded | None:
    """The model with its parameters on the meta device; None where stored tensors would have to be converted.

    Raises:
        ConfigError: transformers cannot build it, or the checkpoint lacks more than a new head.
    """
    try:
        with parameters_on_meta():
            model: nn.Module = auto.from_config(config, dtype=torch.float32, trust_remote_code=trust)
    except (ValueError, OSError, KeyError, RuntimeError, ImportError) as error:
        raise ConfigError(f"checkpoint: {directory} cannot be built by {auto.__name__}: {error}") from None
    try:
        mapping = importlib.import_module("transformers.conversion_mapping")
        transforms = mapping.get_model_conversion_mapping(model)
    except (ModuleNotFoundError, AttributeError):
        return None
    found: Any = model
    found._weight_conversions = transforms
    names = names_in_checkpoint(model, directory)
    stored = Checkpoint(str(directory))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    try:
        fits = {n: stored.tensor(names[n]).shape == s for n, s in shapes.items() if n in names}
    except AnchorError as error:
        raise ConfigError(f"checkpoint: {error}") from None
    missing = sorted(n for n in shapes if not fits.get(n))
    if missing and _converts(transforms, stored, directory):
        return None
    _check_missing(model, missing, directory, new_head=new_head)
    _load_buffers(model, stored)
    added = draw(model, missing, seed=seed)
    return Loaded(model, {n: k for n, k in names.items() if n not in added}, added, whole=False)


def _converts(transforms: Sequence[Any], stored: Checkpoint, directory: Path) -> bool:
    """Whether some stored tensor is not one of the model's, but a part of one or several of them."""
    loading = importlib.import_module("transformers.core_model_loading")
    converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
    if not converters:
        return False
    renamings = [t for t in transforms if isinstance(t, loading.WeightRenaming)]
    return any(
        loading.rename_source_key(name, renamings, converters, "", {})[1] is not None
        for name in stored.files()
    )


def _check_missing(model: nn.Module, missing: Sequence[str], directory: Path, *, new_head: bool) -> None:
    if not missing:
        return
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    share = sum(sizes[name] for name in missing) / max(1, sum(sizes.values()))
    listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    if not new_head:
        raise ConfigError(
            f"checkpoint: {directory} lacks {len(missing)} of the model's tensors, or has them in other "
            f"shapes ({listed}); a model of random weights is not fine-tuned"
        )
    if share > 0.5:
        raise ConfigError(
            f"checkpoint: {directory} lacks {share:.0%} of the model ({listed}), which is more than a new "
            "head: it is probably of another architecture"
        )


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Put every parameter that a module is given on the meta device; buffers keep their values."""
    register = nn.Module.register_parameter

    def empty(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = empty  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _load_buffers(model: nn.Module, stored: Checkpoint) -> None:
    kept = model.state_dict()
    files = stored.files()
    for name, buffer in model.named_buffers():
        if name in kept and name in files and buffer.is_floating_point():
            values = read_piece(stored.tensor(name), FlatRange(0), numel=buffer.numel(), dtype=buffer.dtype)
            buffer.copy_(values.view(buffer.shape))


def draw(model: Any, names: Sequence[str], *, seed: int) -> dict[str, torch.Tensor]:
    """Initial values as the model's own `_init_weights` makes them, by `seed` and name."""
    found: dict[str, torch.Tensor] = {}
    for name in names:
        path, _, own = name.rpartition(".")
        module = copy.deepcopy(model.get_submodule(path))
        module = module.to_empty(device="cpu", recurse=False)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(name_seed(seed, name))
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            model._init_weights(module)
            found[name] = module.get_parameter(own).detach().clone()
    return found


def name_seed(seed: int, name: str) -> int:
    """A seed of its own for each name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")


class Weights:
    """The values of an empty model's parameters, of which each rank reads what it holds."""

    def __init__(self, loaded: Loaded, directory: Path) -> None:
        self._loaded, self._stored = loaded, Checkpoint(str(directory))

    def read(self, fqn: str, shape: tuple[int, ...], region: FlatRange | Box, numel: int) -> torch.Tensor:
        """`region` of the parameter `fqn`, 1-D `[numel]`, float32.

        Raises:
            AnchorError: its file is damaged.
        """
        if numel == 0:
            return torch.empty(0)
        added = self._loaded.added.get(fqn)
        if added is None:
            tensor = self._stored.tensor(self._loaded.names[fqn])
            return read_piece(tensor, region, numel=numel, dtype=torch.float32)
        if isinstance(region, FlatRange):
            return added.reshape(-1)[region.start : region.start + numel].clone()
        for dim, (offset, size) in enumerate(zip(region.offsets, region.sizes, strict=True)):
            added = added.narrow(dim, offset, size)
        return added.reshape(-1).clone()


def places(model: nn.Module) -> Mapping[nn.Parameter, list[tuple[nn.Module, str, str]]]:
    """Where each parameter hangs: module, attribute, FQN; several times if it is tied."""
    found: dict[nn.Parameter, list[tuple[nn.Module, str, str]]] = {}
    for path, module in model.named_modules():
        for name, param in module._parameters.items():
            if param is not None:
                found.setdefault(param, []).append((module, name, f"{path}.{name}" if path else name))
    return found


def auto_class(name: str) -> Any:
    """A class of transformers by name."""
    return getattr(importlib.import_module("transformers"), name)


def read_config(directory: Path, *, trust: bool, **settings: Any) -> Any:
    """The configuration of a checkpoint.

    Raises:
        ConfigError: transformers cannot read it, or it names code of its own that is not trusted.
    """
    make = partial(auto_class("AutoConfig").from_pretrained, directory, local_files_only=True)
    try:
        return make(trust_remote_code=trust, **settings)
    except (ValueError, OSError, KeyError, ImportError) as error:
        hint = "; trust_remote_code: true would run it" if "trust_remote_code" in str(error) else ""
        text = " ".join(str(error).split())
        raise ConfigError(
            f"checkpoint: {directory}: transformers cannot read it: {text:.300}{hint}"
        ) from None


def read_tokenizer(directory: Path, *, trust: bool) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        ConfigError: there is none.
    """
    try:
        return auto_class("AutoTokenizer").from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust
        )
    except Exception as error:  # tokenizers' own exceptions are plain ones
        text = " ".join(str(error).split())
        raise ConfigError(f"checkpoint: {directory} has no tokenizer that loads: {text:.300}") from None
