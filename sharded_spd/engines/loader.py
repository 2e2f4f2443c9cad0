"""How transformers names the tensors of a file: the renamings that `from_pretrained` applies on loading."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch.nn import Module

from sharded_spd.sharding.layout import Loader

_INNER = ("_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_orig_mod")


class TransformersLoader:
    """The renamings of a model's class, by the functions of the installed transformers."""

    def __init__(self, model: Any) -> None:
        self._conversions = _conversions(model)
        self._older: dict[str, str] = getattr(model, "_checkpoint_conversion_mapping", None) or {}
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        self._ignored = [re.compile(pattern) for pattern in ignored]
        self._origin = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")

    def rename(self, names: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
        """The model's name of each tensor of a file; and the tensors that are made from others, and how."""
        if not self._conversions:
            return {name: self._rename_older(name) for name in names} if self._older else {}, {}
        renaming: Any = sys.modules["transformers.core_model_loading"]
        conversions = deepcopy(self._conversions)  # some remember what they have seen
        renamings = [c for c in conversions if isinstance(c, renaming.WeightRenaming)]
        converters = [c for c in conversions if not isinstance(c, renaming.WeightRenaming)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        renamed: dict[str, str] = {}
        made: dict[str, str] = {}
        for name in sorted(names, key=renaming.dot_natural_key):
            to, pattern = renaming.rename_source_key(name, renamings, converters)
            if pattern is None:
                renamed[name] = to
                continue
            targets = by_pattern[pattern].target_patterns
            how = ", ".join(type(operation).__name__ for operation in by_pattern[pattern].operations)
            for target in targets:
                made.setdefault(to.replace(targets[0], target, 1), f"{name} ({how})")
        return renamed, made

    def ignores(self, name: str) -> bool:
        """Whether a tensor that the model lacks is left out on purpose."""
        return any(pattern.search(name) for pattern in self._ignored)

    def loaded_from(self, root: Path) -> bool:
        """Whether the model was loaded from this path."""
        return bool(self._origin) and Path(self._origin).exists() and root.samefile(self._origin)

    def _rename_older(self, name: str) -> str:
        for pattern, replacement in self._older.items():
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        return name


def find_loader(modules: Sequence[Module]) -> Loader | None:
    """The loader of the outermost transformers model among `modules`; None if there is none."""
    modeling: Any = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return None
    return next((TransformersLoader(m) for m in modules if isinstance(m, modeling.PreTrainedModel)), None)


def _conversions(model: Any) -> list[Any]:
    """All renamings of `model` in order; none if this transformers stores them in another form."""
    mapping: Any = sys.modules.get("transformers.conversion_mapping")
    if not hasattr(mapping, "get_model_conversion_mapping"):
        return []
    found = list(mapping.get_model_conversion_mapping(_skeleton(model)))
    known = {(tuple(c.source_patterns), tuple(c.target_patterns)) for c in found}
    # from_pretrained applies the user's key_mapping first.
    given = [
        c
        for c in getattr(model, "_weight_conversions", None) or ()
        if (tuple(c.source_patterns), tuple(c.target_patterns)) not in known
    ]
    return [*given, *found]


def _skeleton(module: Module) -> Module:
    """The modules before anything wrapped them or changed their class: names depend on it."""
    for name in _INNER:
        if isinstance(inner := module._modules.get(name), Module):
            return _skeleton(inner)
    own = next(c for c in type(module).__mro__ if not hasattr(c, "set_reshard_after_backward"))
    bare: Module = object.__new__(own)
    inside = {name: m if m is None else _skeleton(m) for name, m in module._modules.items()}
    bare.__dict__ = {**module.__dict__, "_modules": inside}
    return bare
