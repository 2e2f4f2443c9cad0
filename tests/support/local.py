"""Small single-process helpers of the unit tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.oracle import BaseOracle, LayerOptions, Oracle
from tests.support.compare import assert_layers_close

SHAPES = {"embed.weight": (4, 3), "body.weight": (5, 4), "body.bias": (5,), "norm.weight": (1,)}
LR = 0.02
LAMBDA = 1.5
SPD = LayerOptions(lr=LR, weight_decay=LAMBDA)


def layers(*, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Random layers, exactly representable in float32."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def parameters(start: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Fresh parameters with these values."""
    return {name: nn.Parameter(w.clone()) for name, w in start.items()}


def gradients(steps: int, *, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """Random gradients, so that about half of the conditions fire."""
    return [layers(dtype=dtype, seed=1000 + t) for t in range(steps)]


def give(params: Mapping[str, nn.Parameter], grads: Mapping[str, Tensor]) -> None:
    """Sets `.grad`; None where `grads` has no entry."""
    for name, p in params.items():
        p.grad = grads[name].to(p.dtype).clone() if name in grads else None


def values(params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies of the weights."""
    return {name: p.detach().clone() for name, p in params.items()}


def follow(
    optimizer: torch.optim.Optimizer,
    params: Mapping[str, nn.Parameter],
    oracle: Oracle | BaseOracle,
    grads: Sequence[Mapping[str, Tensor]],
    *,
    relative: float = 1e-10,
    pulls: bool = True,
) -> None:
    """Both take the same steps and agree after each; `pulls`: the rule has to have acted at all."""
    pulled = 0
    for t, given in enumerate(grads):
        give(params, given)
        optimizer.step()
        pulled += sum(stats.s != 0 for stats in oracle.step(given).values())
        assert_layers_close(values(params), oracle.weights, relative=relative, label=f"step {t}:")
    assert not pulls or pulled >= 3, f"the test pulls only {pulled} times and shows nothing"


def plain_values(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a group holds besides its parameters."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}
