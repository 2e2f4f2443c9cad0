"""The command line: `sharded-spd`, also `python -m sharded_spd`."""

from sharded_spd.cli.app import main

__all__ = ["main"]
