"""Robust fine-tuning over sharded parameters: Selective Projection Decay and its relatives.

Each rank keeps its shard of the pre-trained anchor, and one small all-reduce settles all layers' conditions.
"""

from importlib import import_module
from typing import Any

from sharded_spd._moved import MOVED, keep_old_names
from sharded_spd.config import AnchorConfig, LayerConfig, SPDConfig, load_config
from sharded_spd.optim.adam import AdamSPD
from sharded_spd.optim.attach import attach
from sharded_spd.projection.projector import Projector

__all__ = [
    "AdamSPD",
    "AnchorConfig",
    "LayerConfig",
    "Projector",
    "SPDConfig",
    "attach",
    "load_config",
]
__version__ = "0.1.0"

keep_old_names()


def __getattr__(name: str) -> Any:
    if name in MOVED:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
