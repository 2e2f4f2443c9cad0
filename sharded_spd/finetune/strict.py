"""Mappings into frozen dataclasses by their type hints: no key is ignored and no value is bent to fit."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sharded_spd.config.strict_yaml import unknown_key
from sharded_spd.errors import ConfigError, did_you_mean

T = TypeVar("T")


def build(cls: type[T], data: object, path: str = "") -> T:
    """Make the dataclass `cls` of the mapping `data` that stands at `path` of the configuration.

    Raises:
        ConfigError: an unknown key (with the nearest known name), a missing one, or a value of another type.
    """
    if not isinstance(data, Mapping):
        raise wrong(path or "the configuration", "a mapping of settings", data)
    prefix = f"{path}." if path else ""
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in fields:
            raise unknown_key(str(key), fields, prefix)
        values[key] = _convert(value, hints[key], f"{prefix}{key}")
    for name, f in fields.items():
        if name not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{prefix}{name}: is required")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from None


def wrong(path: str, wanted: str, got: object) -> ConfigError:
    """Return the error for a value of another kind than wanted at `path`."""
    return ConfigError(f"{path}: wanted {wanted}, got {got!r:.100} ({type(got).__name__})")


def choice(path: str, value: object, choices: Sequence[str]) -> ConfigError:
    """Return the error for a value that is none of `choices`, with the nearest of them."""
    hint = did_you_mean(value, choices)
    return ConfigError(f"{path}: wanted one of {', '.join(choices)}, got {value!r}{hint}")


def _convert(value: object, hint: Any, path: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        return _convert(value, next(a for a in arguments if a is not types.NoneType), path)
    if origin is Literal:
        if value not in arguments:
            raise choice(path, value, [str(a) for a in arguments])
        return value
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            value = [value]  # one item may be given bare
        return tuple(_convert(item, arguments[0], f"{path}[{index}]") for index, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise wrong(path, "a mapping", value)
        return {str(key): _convert(item, arguments[1], f"{path}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        load = getattr(hint, "load", None)  # a block with its own short form
        return load(value, path) if load is not None else build(hint, value, path)
    return _scalar(value, hint, path)


def _scalar(value: object, hint: Any, path: str) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    raise wrong(path, names.get(hint, str(hint)), value)
