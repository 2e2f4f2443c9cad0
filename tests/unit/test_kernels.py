"""The compiled sums against float64 torch, and how they are built."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sharded_spd.kernels import compile as compiling
from sharded_spd.kernels.cpu import Slice, can_sum, sums
from sharded_spd.stats import DELTA_SQ, GRAD_DOT_DELTA, Block, layer_sums

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ROOT = Path(__file__).resolve().parents[2]


def test_compiled_kernels_are_there() -> None:
    """Where the tests run there is a compiler; else all the others would compare torch with itself."""
    assert compiling.load_library() is not None
    assert can_sum(torch.ones(3), None, torch.ones(3, dtype=torch.bfloat16))
    assert not can_sum(torch.ones(3, dtype=torch.int64))
    assert not can_sum(torch.ones(6)[::2])
    assert not can_sum(torch.ones(3, device="meta"))


def _reference(s: Slice) -> Tensor:
    block = Block(s.weight, s.anchor, s.grad, s.grad_factor)
    dot = torch.zeros((), dtype=torch.float64)
    if s.grad is not None:
        (dot,) = layer_sums(iter([block]), (GRAD_DOT_DELTA,))
    (square,) = layer_sums(iter([block]), (DELTA_SQ,))
    return torch.stack([dot, square])


@st.composite
def _slices(draw: st.DrawFn) -> Slice:
    numel = draw(st.one_of(st.integers(0, 1200), st.sampled_from([65535, 65536, 65537, 140000])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def some(dtype: torch.dtype) -> Tensor:
        offset = draw(st.integers(0, 3))  # slices of flat tensors begin anywhere
        return torch.randn(numel + offset, generator=generator).to(dtype)[offset:]

    weight = some(draw(st.sampled_from(DTYPES)))
    anchor = some(draw(st.sampled_from(DTYPES))) if draw(st.booleans()) else None
    grad = some(draw(st.sampled_from(DTYPES))) if draw(st.booleans()) else None
    return Slice(weight, anchor, grad, draw(st.sampled_from([1.0, -1.0, 2.0**-10])))


@settings(max_examples=60, deadline=None)
@given(st.lists(_slices(), min_size=1, max_size=5))
def test_sums(slices: list[Slice]) -> None:
    """Any dtypes, sizes and offsets; rounding alone sets the two apart."""
    got = sums(slices)
    for row, s in zip(got, slices, strict=True):
        want = _reference(s)
        scale = want[1].abs() + (0 if s.grad is None else s.grad.double().square().sum()) + 1e-30
        assert (row - want).abs().max() <= 1e-13 * scale


def test_order_does_not_depend_on_threads_or_neighbours() -> None:
    """The same bits with one thread and four, alone and among others."""
    made = [Slice(torch.randn(n), torch.randn(n), torch.randn(n)) for n in (3, 70_000, 0, 300_001)]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found += [sums(made), torch.cat([sums([s]) for s in made])]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["weight", "grad"])
def test_what_is_not_finite_shows(bad: float, where: str) -> None:
    """A rule tells by the sums that a layer must be left alone."""
    weight, grad = torch.ones(1000), torch.ones(1000)
    (weight if where == "weight" else grad)[700] = bad
    row = sums([Slice(weight, torch.zeros(1000), grad)])[0]
    assert not torch.isfinite(row[0])


_PROGRAM = """
import logging, sys, time
logging.basicConfig(level=logging.INFO)
from sharded_spd.kernels.compile import load_library
print("there" if load_library() is not None else "not there")
"""


def _run(home: Path, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(home), **environment}
    command = [sys.executable, "-c", _PROGRAM]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ranks_that_start_together_compile_once(tmp_path: Path) -> None:
    """One library, no leftovers, and every rank has it."""
    ranks = [_run(tmp_path) for _ in range(4)]
    assert [rank.communicate(timeout=100)[0].strip() for rank in ranks] == ["there"] * 4
    files = sorted(p.suffix for p in (tmp_path / "sharded_spd" / "kernels").iterdir())
    assert files == [".lock", ".so"]


@pytest.mark.parametrize(
    ("environment", "code", "words"),
    [
        ({"CC": "/nonexistent/cc"}, 0, "plain torch is used"),
        ({"CC": "false"}, 0, "plain torch is used"),
        ({"SHARDED_SPD_KERNELS": "reference"}, 0, ""),
        ({"CC": "/nonexistent/cc", "SHARDED_SPD_KERNELS": "cpu"}, 1, "cannot be compiled"),
        ({"SHARDED_SPD_KERNELS": "fast"}, 1, "wanted auto, reference or cpu"),
    ],
)
def test_without_compiler(environment: dict[str, str], code: int, words: str, tmp_path: Path) -> None:
    """One log line and plain torch, unless the compiled ones are insisted on."""
    rank = _run(tmp_path, **environment)
    out, err = rank.communicate(timeout=100)
    assert rank.returncode == code, err
    assert words in err
    assert code == 1 or out.strip() == "not there"
    assert err.count("plain torch") <= 1


def test_damaged_library_is_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a copy that was cut off, by a full disk."""
    path = tmp_path / "cut.so"
    path.write_bytes(b"\x7fELF")
    monkeypatch.setattr(compiling, "_built", lambda: path)
    with caplog.at_level(logging.INFO):
        assert compiling.load_library.__wrapped__() is None
    assert "plain torch is used" in caplog.text
