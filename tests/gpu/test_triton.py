"""Triton's kernels on an NVIDIA GPU: as plain torch, without a wait of the host, and in a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from sharded_spd.kernels.base import Slice
from sharded_spd.kernels.choose import kernels_for
from sharded_spd.kernels.chunked import ChunkedKernels
from sharded_spd.kernels.reference import ReferenceKernels
from tests.support.slices import DTYPES, assert_same_work, cycle, mixed_work

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    # Every combination of dtypes is compiled on first use.
    pytest.mark.timeout(600),
]
GPU = "cuda"
NUMELS = (1, 1023, 0, 1024, 70_001, 5, 300_000, 2100, 16384, 16385, 700)


@pytest.fixture
def _no_waiting() -> Iterator[None]:
    """The test switches it on after its first step."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_it_is_there() -> None:
    """Else all of these would compare torch with itself."""
    assert kernels_for(GPU).name == "triton"


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_step_as_in_plain_torch(seed: int, amsgrad: bool) -> None:
    work = mixed_work(NUMELS, seed=seed, amsgrad=amsgrad, device=GPU)
    assert_same_work(kernels_for(GPU), ReferenceKernels(), work)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_at_any_address_and_in_pieces(dtype: torch.dtype) -> None:
    """Whether or not loads are vectors, alone or among others, whole or chunk by chunk."""
    numel = 1_000_003
    drawn = [torch.randn(numel, device=GPU).to(dtype) for _ in range(3)]
    shifted = [torch.cat([t[:3], t])[3:] for t in drawn]
    one = Slice(drawn[0], 0, numel, drawn[1], drawn[2], -1.5)
    two = Slice(shifted[0], 0, numel, shifted[1], shifted[2], -1.5)
    kernels = kernels_for(GPU)
    others = mixed_work((7, 2000, 0), seed=1, device=GPU).slices
    found = kernels.table([*others, one, two]).sums(grads=True)[-2:]
    assert torch.equal(found[0], found[1])
    for _ in range(3):
        assert torch.equal(found[:1], kernels.table([one]).sums(grads=True))
    assert torch.equal(found[:1], ChunkedKernels(kernels).table([two]).sums(grads=True))


@pytest.mark.usefixtures("_no_waiting")
def test_never_waits() -> None:
    """Neither where all stays in place, nor where gradients are new ones."""
    work = mixed_work(NUMELS, seed=0, device=GPU)
    kernels = kernels_for(GPU)
    table = kernels.table(work.slices)
    cycle(table, work)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(3):
        table = kernels.table(work.slices, table)
        cycle(table, work)
    moved = [replace(s, grad=None if s.grad is None else s.grad.clone()) for s in work.slices]
    cycle(kernels.table(moved, table), work)


def test_in_a_cuda_graph() -> None:
    """Captured once, played again with other gradients, numbers and shares, some of them 0."""
    ours = mixed_work(NUMELS, seed=5, device=GPU)
    kernels, theirs = kernels_for(GPU), ours.copy()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        table = kernels.table(ours.slices)
        cycle(table, ours)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = cycle(kernels.table(ours.slices, table), ours)
    # The graph's tables outlive those of the steps beside it.
    del table
    other = kernels.table(theirs.slices)
    cycle(other, theirs)  # as the first one above: the capture itself computes nothing
    for t in range(3):
        for s in ours.slices:  # the copies share gradients and anchors with them
            if s.grad is not None:
                s.grad.copy_(torch.randn_like(s.grad))
        ours.numbers[:, 3] = 0.01 * (t + 1)
        ours.shares.copy_(ours.shares.roll(1))
        graph.replay()
        wanted = cycle(other, theirs)
        assert all(torch.equal(f.nan_to_num(), w.nan_to_num()) for f, w in zip(found, wanted, strict=True))
        for a, b in zip(ours.slices, theirs.slices, strict=True):
            assert torch.equal(a.weight.nan_to_num(), b.weight.nan_to_num())
