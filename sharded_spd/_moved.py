"""Modules under the names that they had before, for one release: importing one warns."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import MappingProxyType, ModuleType
from typing import Any

MOVED = MappingProxyType(
    {
        "adam": ("optim.adam",),
        "agree": ("sharding.collectives",),
        "api": ("optim.attach",),
        "batches": ("projection.slices",),
        "carry": ("projection.rule_state",),
        "copies": ("optim.copies",),
        "fused": ("optim.fused_adam",),
        "groups": ("optim.param_groups",),
        "guard": ("binding.checks", "binding.records"),
        "hostvec": ("projection.hyperparams",),
        "integrations.finetune": ("finetune",),
        "items": ("projection.slices",),
        "layout": ("sharding.layout",),
        "monitor": ("projection.metrics",),
        "names": ("sharding.names",),
        "options": ("config.resolve",),
        "plan": ("projection.layers", "projection.reduction"),
        "prefetch": ("projection.prefetch",),
        "projector": ("projection.projector",),
        "roster": ("projection.slices",),
        "scalars": ("projection.hyperparams",),
        "sources": ("config.resolve",),
        "stats": ("rules.statistics", "rules.rows", "sharding.reductions"),
        "step": ("projection.step",),
        "stepper": ("projection.stepper",),
        "strict_yaml": ("config.loading",),
        "sums": ("projection.reduction",),
        "telemetry": ("projection.metrics",),
        "tensorfile": ("safetensors_io.writer",),
        "unbound": ("binding.checks",),
        "verdict": ("projection.reduction",),
        "vouch": ("binding.checks",),
        "warn": ("binding.warnings",),
    }
)
"""Old names and the modules that have what was there, without the package's own name."""

_PACKAGE = __package__ or "sharded_spd"


class OldNames(MetaPathFinder):
    """Finds the modules of `MOVED`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A module that takes everything from the new ones; None for any other name."""
        homes = MOVED.get(fullname.removeprefix(f"{_PACKAGE}."))
        return None if homes is None else ModuleSpec(fullname, _Loader(homes), is_package=False)


class _Loader(Loader):
    def __init__(self, homes: Sequence[str]) -> None:
        self._homes = [f"{_PACKAGE}.{home}" for home in homes]

    def exec_module(self, module: ModuleType) -> None:
        # stacklevel: an import statement is five calls away, all of them importlib's.
        text = (
            f"{module.__name__} is {' and '.join(self._homes)} now; the old name goes with the next release"
        )
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        vars(module)["__getattr__"] = partial(_look_up, module.__name__, [*map(import_module, self._homes)])


def _look_up(old: str, homes: Sequence[ModuleType], name: str) -> Any:
    for home in homes:
        if hasattr(home, name):
            return getattr(home, name)
    raise AttributeError(f"module {old!r} has no attribute {name!r}")


def keep_old_names() -> None:
    """Make the old names importable."""
    # Before the others: an update in place may leave a folder behind that they would take for a package.
    sys.meta_path.insert(0, OldNames())
