"""YAML read strictly: plain data only, no key twice, numbers as people write them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from sharded_spd.errors import ConfigError, did_you_mean

_SYNONYMS = {
    "lambda": "weight_decay",
    "lam": "weight_decay",
    "wd": "weight_decay",
    "strength": "weight_decay",
}


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Read a YAML file as plain data: None if it is empty.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or gives a key twice.
    """
    name = os.fspath(path)
    try:
        return parse_yaml(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not a text file in UTF-8: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def parse_yaml(text: str) -> Any:
    """Parse YAML as `yaml.safe_load` does, but read `1e-5` as a number and refuse a key given twice."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # a SafeLoader: plain data only
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}") from None


def unknown_key(key: str, known: Iterable[str], path: str = "") -> ConfigError:
    """Return the error for a key that does not exist at `path`, with the nearest known name."""
    names = sorted(known)
    hint = did_you_mean(_SYNONYMS[key] if _SYNONYMS.get(key) in names else key, names, cutoff=0.4) or ";"
    return ConfigError(f"{path}{key}: unknown key{hint} known here: {', '.join(names)}")


class _StrictLoader(yaml.SafeLoader):
    """Plain data only, as `yaml.safe_load`; a key given twice is an error; numbers as in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    problem = f"the key {key.value!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return dict(super().construct_mapping(node, deep=deep))


# YAML 1.1, which PyYAML speaks, wants a point and a sign (1.0e-5) and reads 1e-5 as a string.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)
