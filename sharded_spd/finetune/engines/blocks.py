"""Which modules an engine wraps one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from sharded_spd.errors import ConfigError

Precision = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def blocks_of(model: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """The modules to shard one by one: those of the given classes, else of those that must not be split.

    Raises:
        ConfigError: a class that no module of the model has.
    """
    wanted = set(names or getattr(model, "_no_split_modules", None) or ())
    found = [m for m in model.modules() if m is not model and type(m).__name__ in wanted]
    if names and not found:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        raise ConfigError(
            f"engine.blocks: no module is a {' or '.join(names)}; this model has {', '.join(kinds)}"
        )
    return found


def wrap_blocks(
    model: nn.Module, names: tuple[str, ...], wrap: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    """The model with its blocks, and then itself, inside of what `wrap` makes (modified in place)."""
    chosen = set(blocks_of(model, names))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in chosen:
                setattr(parent, name, wrap(child))
    return wrap(model)


def need_ranks(name: str) -> None:
    """Refuse an engine that shards if there is only one process without a launcher.

    Raises:
        ConfigError: torch.distributed is not set up.
    """
    if not torch.distributed.is_initialized():
        raise ConfigError(
            f"engine: {name} needs a launcher's ranks: set ranks: 2 or more, or start with torchrun"
        )
