"""Damage to valid files: bytes anywhere, and values inside of what a parser still reads."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308, float("inf"),
    float("nan"), "", "x", "../../etc/passwd", "/etc/passwd", "..\\..\\x", "a\0b", "\ud800",
    "rank00000.safetensors",
    "rank99999.safetensors", "F32", "BF16", "float32", "float99", "!!python/object/apply:os.system ['true']",
    [], {}, [[]], [0], [-1], [2**62, 2**62], {"": None}, {"$tensor": "x"}, {"$tuple": 3}, {"$bytes": "?"},
    {"$dtype": "load"}, {"$float": "x"}, {"$items": [1]}, {"$": 1}, "spd", "none", "l2sp", "zero", "snapshot",
)  # fmt: skip
"""What a careless or hostile writer puts in the place of a value."""


def damage_bytes(content: bytes, random: Random) -> bytes:
    """Flip, drop, repeat, insert or cut off bytes."""
    data = bytearray(content)
    for _ in range(random.randint(1, 4)):
        at = random.randint(0, max(0, len(data) - 1))
        length = random.randint(1, 16)
        match random.randint(0, 5):
            case 0 if data:
                data[at] ^= 1 << random.randint(0, 7)
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length]
            case 3:
                data[at:at] = bytes(random.randint(0, 255) for _ in range(length))
            case 4:
                data[at : at + length] = b"\xff" * length
            case _:
                del data[at:]
    return bytes(data)


def damage_value(value: Any, random: Random) -> Any:
    """The same structure but for one to three places in it."""
    value = copy.deepcopy(value)
    for _ in range(random.randint(1, 3)):
        value = _at_random_place(value, random)
    return value


def _at_random_place(value: Any, random: Random) -> Any:
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = random.choice(list(value))
        match random.randint(0, 7):
            case 0:
                del value[key]
            case 1:
                value[_name(key, random)] = value.pop(key)
            case 2:
                value[key], other = value[random.choice(list(value))], value[key]
                value[random.choice(list(value))] = other
            case _:
                value[key] = _at_random_place(value[key], random)
        return value
    if isinstance(value, list) and value and random.random() < 0.85:
        at = random.randrange(len(value))
        match random.randint(0, 4):
            case 0:
                del value[at]
            case 1:
                value.insert(at, copy.deepcopy(value[at]))
            case _:
                value[at] = _at_random_place(value[at], random)
        return value
    if isinstance(value, int) and not isinstance(value, bool) and random.random() < 0.5:
        return value + random.choice((-8, -4, -1, 1, 4, 8, 1 << 20, 1 << 40))
    return copy.deepcopy(random.choice(ODD))


def _name(key: Any, random: Random) -> Any:
    if not isinstance(key, str) or random.random() < 0.3:
        return random.choice(["", "x", "__metadata__", "$tensor", "$x", "../x", "model/x"])
    at = random.randint(0, len(key))
    return key[:at] + random.choice(["", "_", ".", "/", "é", "0"]) + key[at + 1 :]


def to_json(value: Any) -> bytes:
    """JSON with all that Python's parser takes."""
    return json.dumps(value).encode("utf-8", "surrogatepass")
