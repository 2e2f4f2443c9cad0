"""Triton's kernels, in its interpreter: there the same code runs on tensors in host memory.

The interpreter must be switched on before triton is first imported; so this file runs itself in a process of
its own. What only a GPU can show is in tests/gpu.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.warm import python

ROOT = Path(__file__).resolve().parents[3]
INSIDE = os.environ.get("TRITON_INTERPRET") == "1"


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    command = python("torch") if arguments[0] == "-c" else sys.executable
    return subprocess.run(
        [command, *arguments], env=env, capture_output=True, text=True, timeout=240, cwd=ROOT
    )


if not INSIDE:
    pytest.importorskip("triton", reason="its wheels are for Linux on x86_64 alone")

    def test_in_the_interpreter() -> None:
        """All the tests of the other half of this file."""
        run = _python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, TRITON_INTERPRET="1")
        assert run.returncode == 0, run.stdout + run.stderr
        assert " passed" in run.stdout

    _CHOICE = """
import logging, sys
logging.basicConfig(level=logging.INFO)
if {hide}: sys.modules["triton"] = None
from sharded_spd.kernels.choose import kernels_for
print(*(kernels_for(device).name for device in {devices}))
kernels_for("cuda")
"""

    @pytest.mark.parametrize(
        ("switch", "interpret", "hide", "devices", "code", "out", "err"),
        [
            ("auto", "0", True, ["cpu", "cuda"], 0, "cpu reference", "plain torch is used on cuda"),
            ("cpu", "0", True, ["cpu", "cuda"], 0, "cpu reference", "plain torch is used on cuda"),
            ("reference", "0", False, ["cpu", "cuda"], 0, "reference reference", ""),
            ("triton", "0", True, ["cpu"], 1, "cpu", "Triton cannot be used on cuda tensors"),
            ("triton", "1", False, ["cpu"], 1, "triton", "Triton cannot be used on cuda tensors"),
            ("auto", "1", False, ["cpu", "cuda"], 0, "cpu reference", "plain torch is used on cuda"),
        ],
    )
    @pytest.mark.skipif(torch.cuda.is_available(), reason="what is chosen where there is no GPU")
    def test_choice(
        switch: str, interpret: str, hide: bool, devices: list[str], code: int, out: str, err: str
    ) -> None:
        """Where Triton cannot be had: one log line and plain torch, unless it is insisted on."""
        program = _CHOICE.format(hide=hide, devices=devices)
        run = _python("-c", program, SHARDED_SPD_KERNELS=switch, TRITON_INTERPRET=interpret)
        assert (run.returncode, run.stdout.strip()) == (code, out), run.stderr
        assert err in run.stderr
        assert run.stderr.count("plain torch is used") <= 1

else:
    from sharded_spd.kernels.base import Moments, Slice
    from sharded_spd.kernels.chunked import ChunkedKernels
    from sharded_spd.kernels.reference import ReferenceKernels
    from sharded_spd.kernels.triton_kernels import CHUNK
    from sharded_spd.kernels.triton_tables import TritonKernels
    from tests.support.slices import assert_same_work, cycle, mixed_work

    KERNELS = TritonKernels("cpu")

    def test_takes() -> None:
        half, parameter = torch.ones(3, dtype=torch.bfloat16), torch.nn.Parameter(torch.ones(2, 2))
        assert KERNELS.takes(torch.ones(3), None, half, parameter)
        assert not KERNELS.takes(torch.ones(3), torch.ones(3, dtype=torch.int64))
        assert not KERNELS.takes(torch.ones(6)[::2])
        assert not KERNELS.takes(torch.ones(3, device="meta"))

    @pytest.mark.parametrize("seed", range(4))
    def test_a_step_as_in_plain_torch(seed: int) -> None:
        """Every mixture of dtypes, offsets, anchors, factors and lengths, in one table."""
        numels = (1, 1023, 0, 1024, 5, 2100, 1, 700, 300)
        assert_same_work(KERNELS, ReferenceKernels(), mixed_work(numels, seed=seed, amsgrad=seed > 1))

    def test_more_than_one_chunk() -> None:
        """Chunks that are just full, or hold one element; three partial sums beside another slice's."""
        work = mixed_work((2 * CHUNK + 1, CHUNK), seed=7, weights=(torch.float32, torch.bfloat16))
        assert_same_work(KERNELS, ReferenceKernels(), work)

    def test_no_slices() -> None:
        for numels in ((), (0, 0)):
            work = mixed_work(numels, seed=0)
            first, stepped, then = cycle(KERNELS.table(work.slices), work)
            assert first.shape == (len(numels), 2)
            assert stepped.shape == (len(numels), 3)
            assert not any(sums.any() for sums in (first, stepped, then))

    def test_order_depends_on_nothing_but_a_slices_length() -> None:
        """The same bits alone and among others, at any address, and piece by piece."""
        numel = 4 * CHUNK + 1500
        torch.manual_seed(0)
        weight, anchor, grad = (torch.randn(numel) for _ in range(3))
        shifted = [torch.cat([torch.zeros(3), t])[3:] for t in (weight, anchor, grad)]
        assert any(t.data_ptr() % 16 for t in shifted)
        one = Slice(weight, 0, numel, anchor, grad, -1.5)
        two = Slice(shifted[0], 0, numel, shifted[1], shifted[2], torch.tensor(-1.5))
        others = mixed_work((7, 2000, 0), seed=1).slices
        found = KERNELS.table([*others, one, two]).sums(grads=True)[-2:]
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[:1], KERNELS.table([one]).sums(grads=True))
        assert torch.equal(found[:1], ChunkedKernels(KERNELS).table([two]).sums(grads=True))

    def test_what_is_not_finite() -> None:
        """It shows in the sums; a weight with no way back, or one that would overflow, stays as it is."""
        weight = torch.tensor([1.0, float("inf"), float("nan"), 60000.0, -0.0], dtype=torch.float16)
        anchor = torch.tensor([3.0, 1.0, 1.0, -60000.0, 1.0], dtype=torch.float16)
        table = KERNELS.table([Slice(weight, 0, 5, anchor, torch.ones(5), 1.0)] * 2)
        assert not torch.isfinite(table.sums(grads=True)).any()
        before = weight.clone()
        table.pull_(torch.tensor([0.0, float("nan")], dtype=torch.float64))
        assert torch.equal(weight.view(torch.int16), before.view(torch.int16))
        table.pull_(torch.tensor([-1.0, 0.0], dtype=torch.float64))
        want = torch.tensor([-1.0, float("inf"), float("nan"), 60000.0, -1.0], dtype=torch.float16)
        assert torch.equal(weight.nan_to_num(), want.nan_to_num())

    @pytest.mark.parametrize("amsgrad", [False, True])
    def test_a_gradient_that_is_not_finite(amsgrad: bool) -> None:
        """Makes of weights and moments what plain torch makes of them."""
        work = mixed_work((5, 6), seed=11, amsgrad=amsgrad, weights=[torch.float32])
        for s, bad in zip(work.slices, (float("nan"), float("inf")), strict=True):
            s.grad = torch.ones_like(s.weight)
            s.grad[s.offset + 2] = bad
        assert_same_work(KERNELS, ReferenceKernels(), work)

    def test_nothing_is_uploaded_twice() -> None:
        """In steps that find their tensors where they were; new gradients cost the addresses alone."""
        work = mixed_work((1024, 70, 0), seed=3, weights=[torch.float32])
        first = KERNELS.table(work.slices)
        first.adam_(work.moments, work.numbers)
        second = KERNELS.table([replace(s) for s in work.slices], first)
        second.adam_([replace(m) for m in work.moments], work.numbers)
        assert second._rows.numbers is first._rows.numbers
        assert second._moments.numbers is first._moments.numbers
        assert second._plan is first._plan
        assert second._adam_plan is first._adam_plan
        moved = [replace(s, grad=None if s.grad is None else s.grad.clone()) for s in work.slices]
        third = KERNELS.table(moved, second)
        assert third._rows.numbers is not second._rows.numbers
        assert third._plan is second._plan
        assert torch.equal(third.sums(grads=True), second.sums(grads=True))
        fewer = KERNELS.table(moved[:1], third)
        assert torch.equal(fewer.sums(grads=True), third.sums(grads=True)[:1])
        more = [Moments(m.exp_avg, m.exp_avg_sq, m.exp_avg_sq.clone()) for m in work.moments[:1]]
        assert torch.isfinite(fewer.adam_(more, work.numbers[:1])).all()
