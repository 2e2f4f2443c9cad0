"""The command line: `sharded-spd`, also `python -m sharded_spd`."""

import sys

EXTRA = {"typer", "rich", "transformers", "datasets", "sklearn", "numpy", "matplotlib", "PIL"}
"""What the command needs beyond the core: the extra `job`."""


def main() -> None:
    """Run the command line; without the extra `job` say how to install it."""
    try:
        from sharded_spd.cli.app import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        sys.exit(f"error: the command needs {error.name}; pip install 'sharded_spd[job]' brings it")
    run()


__all__ = ["main"]
