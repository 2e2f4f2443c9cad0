"""Checkpoints that survive a kill at any moment and load on other ranks and engines."""

from sharded_spd.checkpoint.export import export_safetensors
from sharded_spd.checkpoint.manager import Checkpoints, Resumed

__all__ = ["Checkpoints", "Resumed", "export_safetensors"]
