"""DeepSpeed's own checkpoints, with the projector's state beside the engine's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sharded_spd.checkpoint.ranks import Ranks, everyone
from sharded_spd.errors import CheckpointError, ConfigError
from sharded_spd.projection.projector import Projector

KEY = "sharded_spd"
"""Where the projector's state stands in DeepSpeed's `client_state`."""

_TAG = "deepspeed"


def save(engine: Any, projector: Projector | None, folder: Path) -> None:
    """Let the engine save itself into `folder`. Collective.

    Raises:
        CheckpointError: on every rank, where one could not write.
    """
    _save(engine, projector, str(folder), tag=_TAG, save_latest=False)


def load(engine: Any, projector: Projector | None, folder: Path) -> None:
    """Let the engine load itself from `folder`.

    Raises:
        CheckpointError: where DeepSpeed finds nothing that it can load.
    """
    path, _ = _load(engine, projector, str(folder), tag=_TAG)
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
        ConfigError: where `client_state` has an entry of that name already; on every rank.
        CheckpointError: on every rank, where one could not write.
    """
    return _save(engine, projector, directory, tag, client_state, **options)


def _save(
    engine: Any,
    projector: Projector | None,
    directory: str,
    tag: str | None = None,
    client_state: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    ranks = Ranks(everyone())  # DeepSpeed saves and loads with all, whatever its groups

    def prepare() -> dict[str, Any]:
        if client_state is not None and KEY in client_state:
            raise ConfigError(f"client_state has an entry {KEY!r}, which is the projector's; rename yours")
        return dict(client_state or {})

    state = ranks.agree(prepare, "client_state")
    ranks.compare(operation="save_checkpoint", projector="one" if projector is not None else "none")
    if projector is not None:
        state[KEY] = ranks.agree(projector.state_dict, "the projector's state")
    careful = engine.checkpoint_engine = _Careful(engine.checkpoint_engine)
    try:
        done = engine.save_checkpoint(directory, tag=tag, client_state=state, **options)
    finally:
        engine.checkpoint_engine = careful.inner
    ranks.agree(careful.tell, f"{directory}: DeepSpeed could not save")
    return done


class _Careful:
    """The engine's writer of files, whose failures wait until all ranks are past DeepSpeed's barriers."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self._failure: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def makedirs(self, *args: Any, **kwargs: Any) -> Any:
        return self._try(self.inner.makedirs, *args, **kwargs)

    def save(self, *args: Any, **kwargs: Any) -> Any:
        return self._try(self.inner.save, *args, **kwargs)

    def _try(self, action: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return action(*args, **kwargs)
        except Exception as error:  # raised by `tell`
            self._failure = self._failure or error
            return None

    def tell(self) -> None:
        if self._failure is not None:
            raise self._failure


def load_checkpoint(
    engine: Any, projector: Projector, directory: str, tag: str | None = None, **options: Any
) -> tuple[str | None, dict[str, Any]]:
    """`engine.load_checkpoint`, and the projector's state from it; its path and the rest of `client_state`.

    Collective. Where there is no checkpoint the path is None, as DeepSpeed has it.

    Raises:
        AnchorError: where the checkpoint was written with another anchor; on all ranks.
        CheckpointError: where DeepSpeed could not load it; on all ranks.
    """
    return _load(engine, projector, directory, tag, **options)


def _load(
    engine: Any, projector: Projector | None, directory: str, tag: str | None = None, **options: Any
) -> tuple[str | None, dict[str, Any]]:
    ranks = Ranks(everyone())
    ranks.compare(operation="load_checkpoint", projector="one" if projector is not None else "none")
    path, client_state = ranks.agree(
        lambda: engine.load_checkpoint(directory, tag=tag, **options),
        f"{directory}: DeepSpeed could not load",
    )
    rest = dict(client_state or {})
    if projector is not None and KEY in rest:
        own = rest.pop(KEY)
        ranks.agree(lambda: projector.load_state_dict(own), "the projector does not take its state")
    return path, rest
