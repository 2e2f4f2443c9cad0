"""Warnings of a model that does not start at its anchor, and of a dtype that changes the anchor."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sharded_spd import AdamSPD, SPDConfig, attach
from sharded_spd.anchors.casting import worst_change
from tests.support.anchors import NAME, bind_to, make_anchor, make_model, tensors
from tests.support.local import LAMBDA, LR, give


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_anchor(tmp_path / "anchor")


def _said(projector, optimizer, probe, about: str, steps: int = 2) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            give(dict(probe.named_parameters()), {k: torch.randn_like(t) for k, t in tensors().items()})
            optimizer.step()
    return [str(w.message) for w in caught if about in str(w.message)]


AWAY = "does not start at its anchor"


def _started(folder: Path, start: dict[str, torch.Tensor], form: str, base=torch.optim.Adam):
    probe = make_model(start)
    if form == "adam_spd":
        optimizer = AdamSPD(probe.named_parameters(), lr=LR, weight_decay=LAMBDA, anchor=str(folder))
        return optimizer.projector, optimizer, probe
    optimizer = base(probe.parameters(), lr=LR)
    return attach(optimizer, probe, SPDConfig(anchor=str(folder))), optimizer, probe


@pytest.mark.parametrize("form", ["adam_spd", "attached"])
def test_a_model_that_does_not_start_at_its_anchor_is_warned_about_once(folder: Path, form: str) -> None:
    moved = {**tensors(), "b": tensors()["b"] + 0.1}
    (said,) = _said(*_started(folder, moved, form), AWAY)
    assert "1 layer(s)" in said
    assert "(b)" in said
    assert _said(*_started(folder, tensors(), form), AWAY) == []


def test_rounded_copies_of_the_anchor_start_at_it(folder: Path) -> None:
    assert _said(*_started(folder, {k: t.bfloat16() for k, t in tensors().items()}, "attached"), AWAY) == []


def test_a_resumed_run_is_not_warned_about(folder: Path) -> None:
    """The base's state, or for a base without one the projector's, says that the weights have moved."""
    moved = {**tensors(), "b": tensors()["b"] + 0.1}
    first = _started(folder, tensors(), "attached")
    assert _said(*first, AWAY) == []
    again = _started(folder, moved, "attached")
    again[1].load_state_dict(first[1].state_dict())
    assert _said(*again, AWAY) == []
    plain = _started(folder, moved, "attached", torch.optim.SGD)
    plain[0].load_state_dict(first[0].state_dict())
    assert _said(*plain, AWAY) == []
    assert len(_said(*_started(folder, moved, "attached", torch.optim.SGD), AWAY)) == 1


def test_binding_again_before_the_first_step_keeps_the_warning(folder: Path) -> None:
    started = _started(folder, {**tensors(), "b": tensors()["b"] + 0.1}, "attached")
    started[0].bind()
    assert len(_said(*started, AWAY)) == 1


@pytest.mark.parametrize("source", ["file", "snapshot"])
def test_a_lossy_dtype_is_warned_about(folder: Path, source: str) -> None:
    with pytest.warns(UserWarning, match=r"dtype changed the values of 4 layer.*0\.003") as caught:
        bind_to(folder if source == "file" else "snapshot", dtype="bfloat16")
    assert sum("dtype" in str(w.message) for w in caught) == 1


def test_a_dtype_that_changes_no_value_is_not_warned_about(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    exact = {name: t.bfloat16().to(t.dtype) for name, t in tensors().items()}
    save_file(exact, tmp_path / NAME)
    bind_to(tmp_path, exact, dtype="bfloat16")
    bind_to(tmp_path, exact, dtype="float32")
    assert not [w for w in recwarn if "dtype" in str(w.message)]


def test_values_out_of_range(tmp_path: Path) -> None:
    start = {"w": torch.tensor([1.0, 1e6])}
    save_file(start, tmp_path / NAME)
    with pytest.warns(UserWarning, match=r"up to inf"):
        bind_to(tmp_path, start, dtype="float16")


def test_the_worst_change_of_values() -> None:
    """Zeros and what is not finite count only where they change, in every chunk."""
    nan, inf = float("nan"), float("inf")
    kept = torch.tensor([0.0, 1.0, inf, -inf, nan])
    assert worst_change(kept, kept.clone()) == 0.0
    assert worst_change(torch.tensor([0.0, 4.0, inf]), torch.tensor([0.0, 3.0, inf])) == 0.25
    assert worst_change(torch.tensor([1.0, 1e6]), torch.tensor([1.0, inf])) == inf
    many = torch.ones(600_000)
    changed = many.clone()
    changed[-1] = 1.5
    assert worst_change(many, changed) == 0.5
