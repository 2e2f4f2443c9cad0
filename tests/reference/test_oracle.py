"""The oracle itself against the golden trajectories and against torch's own optimizers."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.reference.golden import SPD_FILES, read_golden
from tests.reference.oracle import BaseOracle, LayerOptions, Oracle


def test_every_spd_file_is_there() -> None:
    """A matrix over no files would pass."""
    assert len(SPD_FILES) == 7


@pytest.mark.parametrize("stem", SPD_FILES)
def test_oracle_follows_golden(stem: str) -> None:
    """Weights, moments and statistics to 1e-12: both are float64, only the order of sums differs."""
    golden = read_golden(stem)
    oracle = Oracle(golden.init, golden.anchors, golden.options, amsgrad=golden.amsgrad)
    for t, grads in enumerate(golden.grads):
        stats = oracle.step(grads)
        for name, reference in golden.params[t].items():
            assert_close(oracle.weights[name], reference, rtol=1e-12, atol=1e-13)
        for name, column in golden.stats.items():
            if name not in grads:
                assert bool(column[t].isnan().all())
                continue
            row = stats[name]
            ratio = row.r if row.c < 0 else 0.0  # the files hold the ratio of layers that are pulled
            got = torch.tensor([row.c, row.n0, row.n1, ratio], dtype=torch.float64)
            assert_close(got, column[t], rtol=1e-10, atol=1e-13)  # r is a difference: relative 1e-12 is lost
    assert_close(oracle.exp_avg, golden.final_exp_avg, rtol=1e-12, atol=1e-14)
    assert_close(oracle.exp_avg_sq, golden.final_exp_avg_sq, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("stem", SPD_FILES)
def test_base_oracle_follows_golden(stem: str) -> None:
    """The rule around torch's Adam is the same method."""
    golden = read_golden(stem)

    def make(params: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        groups = [
            {"params": [p], "lr": o.lr, "betas": o.betas, "eps": o.eps}
            for p, o in ((params[name], golden.options[name]) for name in golden.names)
        ]
        return torch.optim.Adam(groups, amsgrad=golden.amsgrad)

    oracle = BaseOracle(golden.init, golden.anchors, golden.options, make)
    for t, grads in enumerate(golden.grads):
        oracle.step(grads)
        assert_close(oracle.weights, golden.params[t], rtol=1e-11, atol=1e-12)


def test_oracle_decay_is_adamw() -> None:
    """Rule "decay" is torch's decoupled decay."""
    torch.manual_seed(0)
    start = {"w": torch.randn(4, 3, dtype=torch.float64)}
    p = torch.nn.Parameter(start["w"].clone())
    reference = torch.optim.AdamW([p], lr=0.02, weight_decay=0.3, amsgrad=True)
    oracle = Oracle(start, {}, LayerOptions(lr=0.02, weight_decay=0.3, rule="decay"), amsgrad=True)
    for _ in range(20):
        grad = torch.randn(4, 3, dtype=torch.float64)
        p.grad = grad.clone()
        reference.step()
        oracle.step({"w": grad})
    assert_close(oracle.weights["w"], p.detach(), rtol=1e-12, atol=1e-13)
