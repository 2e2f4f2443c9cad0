"""DeepSpeed beside the engine: its start on a CPU, and checkpoints that know their anchor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sharded_spd.errors import ConfigError
from sharded_spd.projector import Projector

KEY = "sharded_spd"
"""Where the projector's state stands in DeepSpeed's `client_state`."""


def disable_shm_op() -> None:
    """Switch DeepSpeed's shared-memory all-reduce off; call it before `deepspeed.initialize`.

    DeepSpeed builds that kernel on any machine without a GPU, which needs a compiler, and leaves 66 MiB per
    rank and run behind in /dev/shm. Without it gloo does the same sums.

    Raises:
        ConfigError: where DeepSpeed is not installed.
    """
    import_deepspeed().ops.__compatible_ops__["deepspeed_shm_comm"] = False


def import_deepspeed() -> Any:
    """The module `deepspeed`.

    Raises:
        ConfigError: where it is not installed.
    """
    try:
        import deepspeed
        import deepspeed.ops
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise ConfigError(
            "DeepSpeed is not installed; pip install 'sharded_spd[deepspeed]' brings it"
        ) from None
    return deepspeed


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
