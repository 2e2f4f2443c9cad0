"""LoRA through peft: weights added beside frozen ones, anchored at zero, saved as an adapter."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sharded_spd.checkpoint.export import Whole, write_wholes
from sharded_spd.errors import ConfigError
from sharded_spd.finetune.config import LoraOptions
from sharded_spd.finetune.tasks.loading import Loaded, name_seed

_PREFIX = "base_model.model."
_ADAPTER = "default"


def import_peft() -> Any:
    """The `peft` library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ModuleNotFoundError as error:
        raise ConfigError(f"lora: needs {error.name}; pip install 'sharded_spd[lora]' brings it") from None


def add_lora(
    loaded: Loaded, options: LoraOptions, *, kind: str | None, head: Sequence[str], seed: int, source: Path
) -> Loaded:
    """The model with LoRA, whose first factor is drawn by `seed` and name and whose second one is zero.

    `kind`: peft's name of the task. `head`: modules that are new, and so trained in full.

    Raises:
        ConfigError: peft finds none of the modules.
    """
    peft = import_peft()
    settings = peft.LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        use_rslora=options.rslora,
        target_modules=list(options.target_modules) or None,
        modules_to_save=[*dict.fromkeys([*options.modules_to_save, *head])] or None,
        task_type=kind,
    )
    try:
        model: nn.Module = peft.get_peft_model(loaded.model, settings)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"lora: {error}") from None
    found: Any = model
    found.peft_config[_ADAPTER].base_model_name_or_path = str(source)
    added: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}
    for fqn, param in list(model.named_parameters()):
        base = base_name(fqn)
        if ".lora_" in fqn:
            added[fqn] = _initial(fqn, tuple(param.shape), seed)
        elif base in loaded.added:
            added[fqn] = loaded.added[base]
        elif base in loaded.names:
            names[fqn] = loaded.names[base]
        _give(model, fqn, param, added.get(fqn), whole=loaded.whole)
    return Loaded(model, names, added, loaded.whole)


def _initial(fqn: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    values = torch.zeros(shape)
    if ".lora_A." in fqn or ".lora_embedding_B." in fqn:
        generator = torch.Generator().manual_seed(name_seed(seed, fqn))
        nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
    return values


def _give(
    model: nn.Module, fqn: str, param: nn.Parameter, value: torch.Tensor | None, *, whole: bool
) -> None:
    if whole:
        if value is not None:
            with torch.no_grad():
                param.copy_(value)
        return
    if not param.is_meta:  # peft made it after the others
        path, _, own = fqn.rpartition(".")
        module = model.get_submodule(path)
        empty = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        if isinstance(module, nn.ParameterDict):
            module[own] = empty
        else:
            module._parameters[own] = empty


def base_name(fqn: str) -> str:
    """A parameter's name in the model without LoRA."""
    name = fqn.removeprefix(_PREFIX)
    for inserted in (".base_layer.", f".modules_to_save.{_ADAPTER}.", ".original_module."):
        name = name.replace(inserted, ".")
    return name


def save_adapter(settings: Any, tensors: Sequence[Whole], directory: Path, add_files: Any) -> None:
    """Write what was trained as peft's adapter, which `from_pretrained` loads onto the base. Collective."""
    names: dict[str, str] = {}
    kept: list[Whole] = []
    for tensor in tensors:
        name = tensor.entry.name
        if ".lora_" in name or f".modules_to_save.{_ADAPTER}." in name:
            names[name] = name.replace(f".modules_to_save.{_ADAPTER}.", ".").replace(f".{_ADAPTER}.", ".")
            kept.append(tensor)
    add = partial(_finish, settings, add_files)
    write_wholes(kept, directory, names=names, max_shard_bytes=1 << 62, add_files=add, replace=True)


def _finish(settings: Any, add_files: Any, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    before, settings.inference_mode = settings.inference_mode, True
    settings.save_pretrained(str(folder))
    settings.inference_mode = before
    add_files(folder)
