"""Settings read strictly: plain YAML, and mappings into frozen dataclasses by their type hints.

No key is ignored, none is taken twice, and no value is bent to fit.
"""

from __future__ import annotations

import dataclasses
import os
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from sharded_spd.errors import ConfigError, did_you_mean

T = TypeVar("T")

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


def shown(value: object) -> str:
    """A value as shown in messages."""
    return f"{value!r:.100} ({type(value).__name__})"


def wrong(path: str, wanted: str, got: object) -> ConfigError:
    """Return the error for a value of another kind than wanted at `path`."""
    return ConfigError(f"{path}: wanted {wanted}, got {shown(got)}")


def choice(path: str, value: object, choices: Sequence[str]) -> ConfigError:
    """Return the error for a value that is none of `choices`, with the nearest of them."""
    return ConfigError(f"{wrong(path, 'one of ' + ', '.join(choices), value)}{did_you_mean(value, choices)}")


def unknown_key(key: str, known: Iterable[str], path: str = "") -> ConfigError:
    """Return the error for a key that does not exist at `path`, with the nearest known name."""
    names = sorted(known)
    hint = did_you_mean(_SYNONYMS[key] if _SYNONYMS.get(key) in names else key, names, cutoff=0.4) or ";"
    return ConfigError(f"{path}{key}: unknown key{hint} known here: {', '.join(names)}")


def build(cls: type[T], data: object, path: str = "") -> T:
    """Make the dataclass `cls` of the mapping `data` that stands at `path` of the configuration.

    What the type hints say is checked here. A dataclass with a class method `load(value, path)` has a short
    form, and a hint `Annotated[type, read]` a reader of its own, `read(value, path)`.

    Raises:
        ConfigError: an unknown key (with the nearest known name), a missing one, or a value of another type.
    """
    if not isinstance(data, Mapping):
        raise wrong(path or "top level", "a mapping of settings", data)
    prefix = f"{path}." if path else ""
    hints = get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in data.items():
        _check_key(key, prefix)
        if key not in fields:
            raise unknown_key(key, fields, prefix)
        values[key] = _convert(value, hints[key], f"{prefix}{key}")
    for name, f in fields.items():
        if name not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{prefix}{name}: is required")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from None


def settle(made: Any) -> None:
    """Read the fields of a frozen dataclass as `build` does, for one that may be made in Python, too.

    Raises:
        ConfigError: a value of another type; it begins with the field's name.
    """
    hints = get_type_hints(type(made), include_extras=True)
    for f in dataclasses.fields(made):
        object.__setattr__(made, f.name, _convert(getattr(made, f.name), hints[f.name], f.name))


def _check_key(key: object, prefix: str) -> None:
    if not isinstance(key, str):
        raise ConfigError(f"{prefix}{key}: keys are strings, got {shown(key)}; quote it or correct it")


def _convert(value: object, hint: Any, path: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return arguments[1](value, path)
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        return _convert(value, next(a for a in arguments if a is not types.NoneType), path)
    if origin is Literal:
        if value not in arguments:
            raise choice(path, value, [str(a) for a in arguments])
        return value
    if origin is tuple:
        return _entries(value, arguments[0], path)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise wrong(path, "a mapping", value)
        for key in value:
            _check_key(key, f"{path}.")
        return {key: _convert(item, arguments[1], f"{path}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        load = getattr(hint, "load", None)
        return load(value, path) if load is not None else build(hint, value, path)
    return _scalar(value, hint, path)


def _entries(value: object, hint: Any, path: str) -> tuple[Any, ...]:
    """A list's; one that is no mapping of settings may be given bare."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        if dataclasses.is_dataclass(hint):
            raise wrong(path, "a list of mappings of settings", value)
        value = [value]
    return tuple(_convert(item, hint, f"{path}[{index}]") for index, item in enumerate(value))


def _scalar(value: object, hint: Any, path: str) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    raise wrong(path, names.get(hint, str(hint)), value)
