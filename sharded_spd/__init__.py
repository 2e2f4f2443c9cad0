"""Robust fine-tuning over sharded parameters: Selective Projection Decay and its relatives.

Each rank keeps its shard of the pre-trained anchor, and one small all-reduce settles all layers' conditions.
"""

from sharded_spd.adam import AdamSPD
from sharded_spd.api import attach
from sharded_spd.config import SPDConfig, load_config
from sharded_spd.projector import Projector

__all__ = ["AdamSPD", "Projector", "SPDConfig", "attach", "load_config"]
__version__ = "0.1.0"
