"""DeepSpeed's own checkpoints, with the projector's state beside the engine's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sharded_spd.errors import CheckpointError, ConfigError
from sharded_spd.projector import Projector

KEY = "sharded_spd"
"""Where the projector's state stands in DeepSpeed's `client_state`."""

_TAG = "deepspeed"


def is_engine(model: Any) -> bool:
    """Whether `model` is an engine of DeepSpeed."""
    return any(cls.__module__.startswith("deepspeed.") for cls in type(model).__mro__)


def save(engine: Any, projector: Projector | None, folder: Path) -> None:
    """Let the engine save itself into `folder`."""
    if projector is None:
        engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
    else:
        save_checkpoint(engine, projector, str(folder), tag=_TAG, save_latest=False)


def load(engine: Any, projector: Projector | None, folder: Path) -> None:
    """Let the engine load itself from `folder`.

    Raises:
        CheckpointError: where DeepSpeed finds nothing that it can load.
    """
    if projector is None:
        path, _ = engine.load_checkpoint(str(folder), tag=_TAG)
    else:
        path, _ = load_checkpoint(engine, projector, str(folder), tag=_TAG)
    if path is None:
        raise CheckpointError(
            f"{folder}: DeepSpeed could not load it; at another number of ranks than it was saved on, "
            "convert it to a universal checkpoint first"
        )


def wholes(engine: Any) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], Callable[[], torch.Tensor]]]:
    """Name, dtype, shape of each parameter and saved buffer, and how to gather it; tied parameters once."""
    import deepspeed

    sharded = engine.zero_optimization_stage() == 3

    def gather(parameter: torch.nn.Parameter) -> torch.Tensor:
        with deepspeed.zero.GatheredParameters([parameter], enabled=sharded):
            return parameter.detach().cpu().clone()

    parameters = dict(engine.module.named_parameters())
    for name, p in parameters.items():
        yield name, p.dtype, tuple(getattr(p, "ds_shape", p.shape)), partial(gather, p)
    every = {name for name, _ in engine.module.named_parameters(remove_duplicate=False)}
    for name, buffer in engine.module.state_dict().items():
        if name not in every:
            yield name, buffer.dtype, tuple(buffer.shape), partial(lambda tensor: tensor, buffer)


def save_checkpoint(
    engine: Any,
    projector: Projector,
    directory: str,
    tag: str | None = None,
    client_state: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """`engine.save_checkpoint`, with the projector's state in `client_state`. Collective.

    Raises:
        ConfigError: where `client_state` has an entry of that name already.
    """
    if client_state is not None and KEY in client_state:
        raise ConfigError(f"client_state has an entry {KEY!r}, which is the projector's; rename yours")
    state = {**(client_state or {}), KEY: projector.state_dict()}
    return engine.save_checkpoint(directory, tag=tag, client_state=state, **options)


def load_checkpoint(
    engine: Any, projector: Projector, directory: str, tag: str | None = None, **options: Any
) -> tuple[str | None, dict[str, Any]]:
    """`engine.load_checkpoint`, and the projector's state from it; its path and the rest of `client_state`.

    Collective. Where there is no checkpoint the path is None, as DeepSpeed has it.

    Raises:
        AnchorError: where the checkpoint was written with another anchor; on all ranks.
    """
    path, client_state = engine.load_checkpoint(directory, tag=tag, **options)
    rest = dict(client_state or {})
    if KEY in rest:
        projector.load_state_dict(rest.pop(KEY))
    return path, rest
