"""State of any depth as tensors by name and a JSON value, and back: no pickle.

An object with a key like `$tuple` is a tagged value. Keys of the state's own that start with `$` get another
one in front, so that none is taken for a tag and every mapping with string keys stays a JSON object.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from sharded_spd.errors import CheckpointError

Tensors = dict[str, Any]
"""Tensors, DTensors and FSDP1's ShardedTensors by name."""

_TAGS = frozenset({"tensor", "tuple", "items", "float", "bytes", "dtype", "counter"})


def split(state: Any, name: str = "") -> tuple[Tensors, Any]:
    """The tensors of `state` by their path, and the rest as JSON that refers to them.

    Raises:
        CheckpointError: JSON cannot hold a value; names its path.
    """
    tensors: Tensors = {}
    return tensors, _encode(state, name, tensors)


def join(value: Any, tensors: Mapping[str, Any]) -> Any:
    """The inverse of `split`.

    Raises:
        CheckpointError: `value` is not a result of `split`, or refers to a missing tensor.
    """
    if isinstance(value, list):
        return [join(x, tensors) for x in value]
    if not isinstance(value, dict):
        return value
    tag = next((key[1:] for key in value if _is_tag(key)), None)
    if tag is None:
        return {key_of(key): join(x, tensors) for key, x in value.items()}
    if tag not in _TAGS or len(value) != 1:
        raise CheckpointError(f"corrupt values: {value!r:.100} has no meaning here")
    return _decode(tag, value[f"${tag}"], tensors)


def tensor_names(value: Any) -> list[str]:
    """The tensors that an encoded value refers to."""
    if isinstance(value, list):
        return [name for x in value for name in tensor_names(x)]
    if not isinstance(value, dict):
        return []
    if "$tensor" in value:
        return [str(value["$tensor"])]
    return [name for x in value.values() for name in tensor_names(x)]


def key_of(encoded: str) -> str:
    """The original of a key `encoded` in an encoded mapping."""
    return encoded[1:] if encoded.startswith("$") else encoded


def _is_tag(key: str) -> bool:
    return key.startswith("$") and not key.startswith("$$")


def merge(own: Any, saved: Any) -> Any:
    """The entries of `own`, an encoded state, with the values of `saved` where it has them.

    Ranks may have entries that others lack (experts), and only one rank's values are saved.
    """
    if isinstance(own, dict) and isinstance(saved, dict) and not any(map(_is_tag, own)):
        return {key: merge(x, saved[key]) if key in saved else x for key, x in own.items()}
    if isinstance(own, list) and isinstance(saved, list) and len(own) == len(saved):
        return [merge(x, y) for x, y in zip(own, saved, strict=True)]
    return own if isinstance(own, dict) and "$tensor" in own else saved


def _encode(value: Any, path: str, tensors: Tensors) -> Any:
    if isinstance(value, (torch.Tensor, ShardedTensor)):
        name = path
        while name in tensors:  # keys 1 and "1", "a/b" and a: {b: ...}
            name += "#"
        tensors[name] = value
        return {"$tensor": name}
    if value is None or isinstance(value, (bool, int, str)):
        _check_text(value, path)
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, Counter):
        return {"$counter": _encode_mapping(dict(value), path, tensors)}
    if isinstance(value, Mapping):
        return _encode_mapping(value, path, tensors)
    if isinstance(value, (list, tuple)):
        items = [_encode(x, f"{path}/{i}", tensors) for i, x in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    item = getattr(value, "item", None)  # numpy's scalars
    if item is not None and getattr(value, "shape", None) == ():
        return _encode(item(), path, tensors)
    raise CheckpointError(
        f"{path}: a {type(value).__name__} cannot be stored without pickling it; give numbers, strings, "
        "lists, dicts or tensors"
    )


def _check_text(value: Any, path: str) -> None:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise CheckpointError(f"{path!r}: {value!r:.50} is no text that a file can hold") from None


def _encode_mapping(value: Mapping[Any, Any], path: str, tensors: Tensors) -> Any:
    for key in value:
        _check_text(key, path)
    if all(isinstance(key, str) for key in value):
        return {
            f"${key}" if key.startswith("$") else key: _encode(x, f"{path}/{key}" if path else key, tensors)
            for key, x in value.items()
        }
    pairs = [[_encode(k, path, tensors), _encode(x, f"{path}/{k}", tensors)] for k, x in value.items()]
    return {"$items": pairs}


def _decode(tag: str, content: Any, tensors: Mapping[str, Any]) -> Any:
    try:
        if tag == "tensor":
            return tensors[content]
        if tag == "tuple":
            return tuple(join(list(content), tensors))
        if tag == "counter":
            return Counter(join(content, tensors))
        if tag == "items":
            return {join(key, tensors): join(x, tensors) for key, x in content}
        if tag == "float":
            return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[content]
        if tag == "dtype":
            found = getattr(torch, content)
            if not isinstance(found, torch.dtype):
                raise KeyError(content)
            return found
        return base64.b64decode(content, validate=True)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"corrupt values: {tag} {content!r:.100} ({what})") from None
