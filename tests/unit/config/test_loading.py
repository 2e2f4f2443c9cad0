"""YAML as people write it, and mappings into dataclasses: nothing is ignored, nothing bent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from sharded_spd.config.loading import build, parse_yaml, settle, wrong
from sharded_spd.errors import ConfigError


def _even(value: object, path: str) -> int:
    if not isinstance(value, int) or value % 2:
        raise wrong(path, "an even number", value)
    return value


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: Annotated[int, _even] | None = None
    kind: Literal["near", "far"] = "near"


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    ratio: float = 0.5
    inner: Inner = Inner()
    several: tuple[Inner, ...] = ()
    numbers: tuple[int, ...] = ()
    options: Mapping[str, Any] | None = None
    by_name: Mapping[str, tuple[float, ...]] | None = None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-2e+3", -2e3),
        ("1.5e3", 1.5e3),
        (".5e1", 5.0),
        ("1.e2", 100.0),
        ("3", 3),
    ],
)
def test_numbers_as_people_write_them(text, value):
    assert parse_yaml(f"x: {text}") == {"x": value}
    assert type(parse_yaml(f"x: {text}")["x"]) is type(value)


@pytest.mark.parametrize("text", ["e5", "1e", "1e-5x", '"1e-5"', "1.2.3e4", "head.1e5"])
def test_words_stay_words(text):
    assert isinstance(parse_yaml(f"x: {text}")["x"], str)


def test_merge_keys_may_override():
    data = parse_yaml("base: &b {rule: spd, weight_decay: 1}\nuse: {<<: *b, weight_decay: 2}\n")
    assert data["use"] == {"rule": "spd", "weight_decay": 2}


def test_a_mapping_becomes_what_the_hints_say() -> None:
    data = {
        "name": "a",
        "ratio": 1,
        "inner": {"size": 4},
        "several": [{"kind": "far"}, Inner()],
        "numbers": 3,
        "by_name": {"x": [1, 2.5]},
    }
    found = build(Outer, data)
    assert found == Outer(
        name="a",
        ratio=1.0,
        inner=Inner(size=4),
        several=(Inner(kind="far"), Inner()),
        numbers=(3,),
        by_name={"x": (1.0, 2.5)},
    )
    assert type(found.ratio) is float


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1], r"^here: wanted a mapping of settings, got \[1\] \(list\)$"),
        ({}, r"^here\.name: is required$"),
        ({"nam": "a"}, r"^here\.nam: unknown key; did you mean 'name'\? known here: by_name, inner, "),
        ({2: "a"}, r"^here\.2: keys are strings, got 2 \(int\)"),
        ({"name": 2}, r"^here\.name: wanted a text, got 2 \(int\)$"),
        ({"name": "a", "ratio": True}, r"^here\.ratio: wanted a number, got True \(bool\)$"),
        ({"name": "a", "numbers": [1, "2"]}, r"^here\.numbers\[1\]: wanted a whole number, got '2' \(str\)$"),
        (
            {"name": "a", "several": {"size": 2}},
            r"^here\.several: wanted a list of mappings of settings, got ",
        ),
        ({"name": "a", "several": [{"size": 3}]}, r"^here\.several\[0\]\.size: wanted an even number, got 3"),
        (
            {"name": "a", "inner": {"kind": "fat"}},
            r"^here\.inner\.kind: .* near, far, got 'fat' .* mean 'far'\?$",
        ),
        ({"name": "a", "options": {3: 4}}, r"^here\.options\.3: keys are strings"),
        ({"name": "a", "by_name": {"x": "y"}}, r"^here\.by_name\.x\[0\]: wanted a number"),
    ],
)
def test_a_value_that_does_not_fit_is_told_with_its_path(data: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Outer, data, "here")


def test_what_is_made_in_python_is_read_alike() -> None:
    made = Inner(size=4)
    settle(made)
    assert made == Inner(size=4)
    for bad, message in (
        (Inner(size=3), "^size: wanted an even number"),
        (Inner(kind="fat"), "^kind: wanted"),
    ):
        with pytest.raises(ConfigError, match=message):
            settle(bad)
