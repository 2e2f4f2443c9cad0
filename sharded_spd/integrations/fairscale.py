"""The parts of fairscale that the package's own commands need."""

from __future__ import annotations

from typing import Any

from sharded_spd.errors import ConfigError


def import_fairscale() -> Any:
    """The module `fairscale`, with its optimizers and wrappers.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import fairscale
        import fairscale.nn.data_parallel
        import fairscale.optim
    except ModuleNotFoundError as error:
        if error.name != "fairscale":
            raise
        raise ConfigError(
            "fairscale is not installed; pip install 'sharded_spd[fairscale]' brings it"
        ) from None
    return fairscale
