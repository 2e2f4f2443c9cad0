"""The compiled kernels against plain torch, and how they are built."""

from __future__ import annotations

import math
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sharded_spd.kernels.base import Backend, Moments, Slice
from sharded_spd.kernels.chunked import ChunkedKernels
from sharded_spd.kernels.cpu import CpuKernels, cpu_kernels
from sharded_spd.kernels.reference import ReferenceKernels
from tests.support.warm import python

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(name="cpu")
def fixture_cpu() -> CpuKernels:
    """Where the tests run there is a compiler; else all of these would compare torch with itself."""
    kernels = cpu_kernels()
    assert kernels is not None
    return kernels


def test_takes(cpu: CpuKernels) -> None:
    assert cpu.takes(torch.ones(3), None, torch.ones(3, dtype=torch.bfloat16), nn.Parameter(torch.ones(2, 2)))
    assert not cpu.takes(torch.ones(3), torch.ones(3, dtype=torch.int64))
    assert not cpu.takes(torch.ones(6)[::2])
    assert not cpu.takes(torch.ones(3, device="meta"))


@st.composite
def _slices(draw: st.DrawFn) -> Slice:
    numel = draw(st.one_of(st.integers(0, 1200), st.sampled_from([65535, 65536, 65537, 140000])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    offset = draw(st.integers(0, 3))  # slices of flat tensors begin anywhere

    def some(dtype: torch.dtype, numel: int) -> Tensor:
        return torch.randn(numel, generator=generator).to(dtype)

    weight = some(draw(st.sampled_from(DTYPES)), numel + offset + 2)
    anchor = some(draw(st.sampled_from(DTYPES)), numel) if draw(st.booleans()) else None
    grad = some(draw(st.sampled_from(DTYPES)), weight.numel()) if draw(st.booleans()) else None
    return Slice(weight, offset, numel, anchor, grad, draw(st.sampled_from([1.0, -1.0, 2.0**-10])))


@settings(max_examples=60, deadline=None)
@given(slices=st.lists(_slices(), min_size=1, max_size=5))
def test_sums(slices: list[Slice]) -> None:
    """Any dtypes, sizes and offsets; rounding alone sets the two apart."""
    cpu = cpu_kernels()
    assert cpu is not None
    got = cpu.table(slices).sums(grads=True)
    want = ReferenceKernels().table(slices).sums(grads=True)
    for ours, theirs, s in zip(got, want, slices, strict=True):
        grad = s.flat_grad()
        scale = theirs[1].abs() + (0 if grad is None else grad.double().square().sum()) + 1e-30
        assert (ours - theirs).abs().max() <= 1e-13 * scale
    assert torch.equal(cpu.table(slices).sums(grads=False)[:, 1], got[:, 1])


def _close(ours: Tensor, theirs: Tensor) -> None:
    """Within 2 units in the last place."""
    spacing = torch.finfo(theirs.dtype).eps * theirs.double().abs().clamp(min=torch.finfo(theirs.dtype).tiny)
    both_nan = ours.isnan() & theirs.isnan()
    assert (both_nan | (ours == theirs) | ((ours.double() - theirs.double()).abs() <= 2 * spacing)).all()


@settings(max_examples=60, deadline=None)
@given(slices=st.lists(_slices(), min_size=1, max_size=4), data=st.data())
def test_pull(slices: list[Slice], data: st.DataObject) -> None:
    """Short of the anchor, to it and beyond; 0 and what is not finite leave the bits alone."""
    cpu = cpu_kernels()
    assert cpu is not None
    shares = [data.draw(st.sampled_from([0.0, 1e-7, 0.25, 0.5, 1.0, 3.0])) for _ in slices]
    s = torch.tensor(shares, dtype=torch.float64)
    for own in slices:
        if own.numel > 2 and data.draw(st.booleans()):
            own.weight[own.offset + 1] = float("inf")
            own.weight[own.offset + 2] = float("nan")
    others = [replace(own, weight=own.weight.clone()) for own in slices]
    before = [own.weight.clone() for own in slices]
    cpu.table(slices).pull_(s)
    ReferenceKernels().table(others).pull_(s)
    for ours, theirs, old, share in zip(slices, others, before, shares, strict=True):
        _close(ours.weight, theirs.weight)
        if share == 0:
            assert torch.equal(ours.weight.view(torch.uint8), old.view(torch.uint8))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_adam_is_torchs_fused_adam(kind: torch.dtype, amsgrad: bool, kernels: str, cpu: CpuKernels) -> None:
    """Five steps of a tensor's two slices, as torch steps all of it; and the sums around them."""
    torch.manual_seed(0)
    backend: Backend = cpu if kernels == "cpu" else ReferenceKernels()
    numel = 4103
    spans = ((0, 1030), (1030, numel))
    ours, anchor = torch.randn(numel).to(kind), torch.randn(numel).to(kind)
    theirs = nn.Parameter(ours.clone())
    moments = Moments(*(torch.zeros(numel, dtype=kind) for _ in range(3 if amsgrad else 2)))
    reference = torch.optim.Adam([theirs], lr=0.01, fused=True, amsgrad=amsgrad)
    for t in range(1, 6):
        grad = torch.randn(numel).to(kind)
        slices = [Slice(ours, begin, end - begin, anchor[begin:end], grad) for begin, end in spans]
        table, before = backend.table(slices), backend.table(slices).sums(grads=True)
        row = [0.9, 0.999, 1e-8, 0.01 / (1 - 0.9**t), math.sqrt(1 - 0.999**t)]
        rows = table.adam_([moments] * 2, torch.tensor([row, row], dtype=torch.float64))
        theirs.grad = grad
        reference.step()
        torch.testing.assert_close(rows[:, :2], before, rtol=1e-13, atol=1e-10)
        torch.testing.assert_close(rows[:, 2], table.sums(grads=False)[:, 1], rtol=1e-13, atol=1e-10)
    torch.testing.assert_close(ours, theirs.detach(), rtol=4 * torch.finfo(kind).eps, atol=1e-7)


def test_chunk_by_chunk_to_the_last_bit(cpu: CpuKernels) -> None:
    """As where an anchor is read from disk."""
    torch.manual_seed(0)
    made = []
    for backend in (cpu, ChunkedKernels(cpu)):
        torch.manual_seed(0)
        slices = [
            Slice(torch.randn(n + 3), 3, n, torch.randn(n), torch.randn(n + 3)) for n in (0, 5, 200_000)
        ]
        moments = [Moments(torch.zeros_like(s.weight), torch.zeros_like(s.weight)) for s in slices]
        numbers = torch.tensor([[0.9, 0.999, 1e-8, 0.1, 0.03]] * 3, dtype=torch.float64)
        table = backend.table(slices)
        found = [table.sums(grads=True), table.adam_(moments, numbers)]
        table.pull_(torch.tensor([1.0, 0.0, 0.3], dtype=torch.float64))
        made.append([*found, *(s.weight for s in slices), *(m.exp_avg_sq for m in moments)])
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


def test_order_does_not_depend_on_threads_or_neighbours(cpu: CpuKernels) -> None:
    """The same bits with one thread and four, alone and among others."""
    numels = (3, 70_000, 0, 300_001)
    made = [Slice(torch.randn(n), 0, n, torch.randn(n), torch.randn(n)) for n in numels]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(cpu.table(made).sums(grads=True))
            found.append(torch.cat([cpu.table([s]).sums(grads=True) for s in made]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["weight", "grad"])
def test_what_is_not_finite_shows(bad: float, where: str, cpu: CpuKernels) -> None:
    """A rule tells by the sums that a layer must be left alone."""
    weight, grad = torch.ones(1000), torch.ones(1000)
    (weight if where == "weight" else grad)[700] = bad
    row = cpu.table([Slice(weight, 0, 1000, torch.zeros(1000), grad)]).sums(grads=True)[0]
    assert not torch.isfinite(row[0])


_PROGRAM = """
import logging, sys, time
logging.basicConfig(level=logging.INFO)
from sharded_spd.kernels.compile import load_library
print("there" if load_library() is not None else "not there")
"""


def _run(home: Path, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(home), **environment}
    command = [python("torch"), "-c", _PROGRAM]
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
        ({"SHARDED_SPD_KERNELS": "fast"}, 1, "wanted auto, reference, cpu or triton"),
    ],
)
def test_without_compiler(environment: dict[str, str], code: int, words: str, tmp_path: Path) -> None:
    """One warning and plain torch, unless the compiled ones are insisted on."""
    rank = _run(tmp_path, **environment)
    out, err = rank.communicate(timeout=100)
    assert rank.returncode == code, err
    assert words in err
    assert code == 1 or out.strip() == "not there"
    assert err.count("plain torch") <= 1
