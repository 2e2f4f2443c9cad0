"""DeepSpeed helpers: start on a CPU, and checkpoints with their anchor's fingerprint."""

from __future__ import annotations

from typing import Any

from sharded_spd.checkpoint.deepspeed import load_checkpoint, save_checkpoint
from sharded_spd.errors import ConfigError

__all__ = ["disable_shm_op", "import_deepspeed", "load_checkpoint", "save_checkpoint"]


def disable_shm_op() -> None:
    """Switch DeepSpeed's shared-memory all-reduce off; call it before `deepspeed.initialize`.

    Without a GPU DeepSpeed compiles that kernel, which needs a compiler, and leaves 66 MiB per
    rank and run in /dev/shm. Without it gloo computes the same sums.

    Raises:
        ConfigError: DeepSpeed is not installed.
    """
    import_deepspeed().ops.__compatible_ops__["deepspeed_shm_comm"] = False


def import_deepspeed() -> Any:
    """The module `deepspeed`.

    Raises:
        ConfigError: it is not installed.
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
