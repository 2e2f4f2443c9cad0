"""The tensor of an anchor for each layer of a model, before any training."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sharded_spd.anchors import FileAnchor
from sharded_spd.engines.model import view_model
from sharded_spd.errors import ConfigError


def show_names(path: str, folder: str, rules: Mapping[str, str]) -> bool:
    """Print them for the transformers model that `folder` describes; return whether the anchor does not fit.

    Raises:
        ConfigError: transformers is missing, or has no such model.
    """
    try:
        import transformers
    except ImportError:
        raise ConfigError("--names makes the model of a config.json: pip install transformers") from None
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = getattr(transformers, (config.architectures or ["(none)"])[0])(config)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{folder}: wanted the config.json of a transformers model: {error}") from None
    view = view_model(model)
    shapes = {name: tuple(param.shape) for param, name in view.names.items()}
    store = FileAnchor(path, names=rules)
    store.know(view.facts, view.fqns)
    problems = store.problems(shapes)
    for layer in shapes:
        print(f"{layer} <- {store.names.get(layer) or '(nothing)'}")
    for sentence in [*store.notes(layer for layer in shapes if store.names.get(layer)), *problems]:
        print(sentence)
    return bool(problems)
