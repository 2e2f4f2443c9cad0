"""State of any depth as tensors by name and a JSON value, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sharded_spd import AdamSPD
from sharded_spd.checkpoint import Checkpoints
from sharded_spd.checkpoint.codec import join, split, tensor_names
from sharded_spd.checkpoint.folder import folder_of

KEYS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    st.text("$/#@~ab", max_size=4),
    st.sampled_from(["$tensor", "$$tensor", "$items", "$tuple", "a/b", ""]),
)
LEAVES = st.one_of(
    st.integers(0, 99).map(torch.tensor), st.integers(), st.booleans(), st.none(), KEYS, st.binary(max_size=3)
)
STATES = st.dictionaries(
    KEYS,
    st.recursive(
        LEAVES,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(st.one_of(KEYS, st.integers()), inner, max_size=3),
        ),
        max_leaves=12,
    ),
    max_size=4,
)


@settings(max_examples=100, deadline=None)
@given(STATES)
def test_round_trip(state: dict[str, Any]) -> None:
    """Whatever the keys: those that look like tags, paths, or names that were made unique."""
    tensors, encoded = split(state)
    encoded = json.loads(json.dumps(encoded))
    assert sorted(tensor_names(encoded)) == sorted(tensors)
    assert repr(join(encoded, tensors)) == repr(state)


@pytest.mark.parametrize("names", [("$a", "a/b"), ("$", "$$a"), ("x#", "ü@0"), ("$tensor", "a")])
def test_odd_names_of_layers(names: tuple[str, ...], tmp_path: Path) -> None:
    """A run whose layers are called like this goes on exactly."""

    def make() -> tuple[nn.ModuleDict, AdamSPD]:
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(2, 2) for name in names})
        model.register_parameter(names[0] + "/w", nn.Parameter(torch.ones(2)))
        return model, AdamSPD(model.named_parameters(), lr=0.1, weight_decay=1.0)

    def step(model: nn.ModuleDict, optimizer: AdamSPD, seed: int) -> None:
        given = torch.randn(3, 2, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        extra = model.get_parameter(names[0] + "/w")
        torch.stack(
            [layer(given).square().sum() for layer in model.values()] + [extra.sum()]
        ).sum().backward()
        optimizer.step()

    model, optimizer = make()
    for seed in range(3):
        step(model, optimizer, seed)
    Checkpoints(tmp_path).save(3, model, optimizer)
    other, resumed = make()
    assert Checkpoints(tmp_path).load(other, resumed) is not None
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(other, resumed, seed)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_steps_of_nine_digits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Folders are compared as numbers: what is older goes, what is newer stays, and is warned of."""
    model, old, new = nn.Linear(1, 1), 99_999_998, 100_000_000
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(old, model)
    unfinished = folder_of(tmp_path, old + 1)
    unfinished.mkdir()
    part = tmp_path / f".{unfinished.name}.0123abcd.part"
    part.mkdir()
    later = folder_of(tmp_path, new + 1)
    later.mkdir()
    last = checkpoints.save(new, model)
    assert {path.name for path in tmp_path.iterdir()} == {last.name, later.name}
    assert checkpoints.latest() == last
    later.rmdir()
    first = Checkpoints(tmp_path, keep_last=None).save(old, model)
    Checkpoints(tmp_path).load(model, path=first)
    assert f"{last.name} is newer" in caplog.text
    caplog.clear()
    Checkpoints(tmp_path).load(model, path=last)
    assert "newer" not in caplog.text
