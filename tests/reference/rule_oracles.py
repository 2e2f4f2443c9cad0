"""The rules beside SPD in float64 on whole tensors, row by row and layer by layer: slow and obvious."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.reference.oracle import LayerStats, Oracle


@dataclass
class RuleOracle(Oracle):
    """Adam, or SGD where `momentum` is given, and a rule.

    `decays`: AdamW's decay by the layer's weight_decay comes first. `order`: all layers' names.
    """

    decays: bool = False
    momentum: float | None = None
    order: tuple[str, ...] = ()
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def step(self, grads: Mapping[str, Tensor]) -> dict[str, LayerStats]:
        """One step on the layers that have a gradient; of the statistics, only s is filled in."""
        result = {}
        for name, given in grads.items():
            grad, before, anchor = given.detach().double(), self.weights[name], self.anchors[name]
            seen = self.edit(name, grad, before - anchor)
            if self.decays:
                self.weights[name] = before * (1 - self.of(name).lr * self.of(name).weight_decay)
            tentative = self.base(name, seen)
            self.weights[name] = self.settle(name, grad, before, tentative, anchor)
            acted = not torch.equal(self.weights[name], tentative) or not torch.equal(seen, grad)
            result[name] = LayerStats(0.0, 0.0, 0.0, 0.0, float(acted))
        return result

    def base(self, name: str, grad: Tensor) -> Tensor:
        """The tentative weights."""
        if self.momentum is None:
            return self._adam(name, grad)
        old = self.buffers.get(name)
        self.buffers[name] = grad if old is None else self.momentum * old + grad
        return self.weights[name] - self.of(name).lr * self.buffers[name]

    def edit(self, name: str, grad: Tensor, delta: Tensor) -> Tensor:
        """The gradient that the base sees."""
        return grad

    def settle(self, name: str, grad: Tensor, before: Tensor, tentative: Tensor, anchor: Tensor) -> Tensor:
        """The weights after the rule."""
        return tentative


def rows_of(tensor: Tensor) -> list[Tensor]:
    """One per index of dim 0; a tensor of one dim or none is one row."""
    return list(tensor) if tensor.ndim > 1 else [tensor]


def _join(rows: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(rows) if like.ndim > 1 else rows[0]


@dataclass
class ScalarAdam:
    """Adam on one number."""

    mean: float = 0.0
    square: float = 0.0
    count: int = 0

    def move(self, gradient: float, lr: float) -> float:
        """What to add."""
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient**2
        root = math.sqrt(self.square / (1 - 0.999**self.count))
        return -lr * (self.mean / (1 - 0.9**self.count)) / (root + 1e-8)


@dataclass
class FTPOracle(RuleOracle):
    """Fast Trainable Projection."""

    k: float = 1.0
    radius: dict[str, float] = field(default_factory=dict)
    hyper: dict[str, ScalarAdam] = field(default_factory=dict)
    last: dict[str, tuple[Tensor, list[float]]] = field(default_factory=dict)

    def settle(self, name: str, grad: Tensor, before: Tensor, tentative: Tensor, anchor: Tensor) -> Tensor:
        """w0 + min(1, gamma / n) * c, row by row."""
        c = tentative - anchor
        n = [float(row.abs().sum()) + 1e-8 for row in rows_of(c)]
        h = 0.0
        if name in self.last:
            prev_c, prev_n = self.last[name]
            for g_row, c_row, n_row in zip(rows_of(grad), rows_of(prev_c), prev_n, strict=True):
                h += float((g_row * c_row).sum()) / n_row
        if h > 0:
            h *= self.k
        gamma = self.radius.get(name, 1e-8) + self.hyper.setdefault(name, ScalarAdam()).move(h, 1e-2)
        gamma = self.radius[name] = max(1e-8, min(gamma, max(n)))
        self.last[name] = (c, n)
        return anchor + _join([min(1.0, gamma / m) * row for row, m in zip(rows_of(c), n, strict=True)], c)


@dataclass
class MarsOracle(RuleOracle):
    """A ball of a fixed radius."""

    radius: float = 1.0

    def settle(self, name: str, grad: Tensor, before: Tensor, tentative: Tensor, anchor: Tensor) -> Tensor:
        """Rows that are longer than the radius are cut to it."""
        kept = []
        for row in rows_of(tentative - anchor):
            length = float(row.abs().sum())
            kept.append(row * (self.radius / length) if length > self.radius else row)
        return anchor + _join(kept, tentative)


@dataclass
class CWDOracle(RuleOracle):
    """w - a * (u + lambda * 1[u * d >= 0] * d)."""

    def settle(self, name: str, grad: Tensor, before: Tensor, tentative: Tensor, anchor: Tensor) -> Tensor:
        """Element by element."""
        own, d = self.of(name), before - anchor
        u = (before - tentative) / own.lr
        mask = (u * d >= 0).double()
        return before - own.lr * (u + own.weight_decay * mask * d)


@dataclass
class MAPSOracle(RuleOracle):
    """SPD of a strength that falls from the first to the last of the layers that are no bias and no head."""

    head: str = ""

    def settle(self, name: str, grad: Tensor, before: Tensor, tentative: Tensor, anchor: Tensor) -> Tensor:
        """SPD's pull by lambda_k."""
        deep = [n for n in self.order if n.rpartition(".")[2] != "bias" and n != self.head]
        if name not in deep:
            return tentative
        strength = self.of(name).weight_decay * (1 - deep.index(name) / (len(deep) - 1))
        n0, n1 = float((before - anchor).norm()), float((tentative - anchor).norm())
        if float((grad * (before - anchor)).sum()) <= 0 or n1 <= n0:
            return tentative
        return tentative - strength * (n1 - n0) / n1 * (tentative - anchor)


@dataclass
class DiGraPOracle(RuleOracle):
    """Part of the gradient's projection on d is taken out where the step would go away from the anchor."""

    omega: dict[str, float] = field(default_factory=dict)
    hyper: dict[str, ScalarAdam] = field(default_factory=dict)
    last: dict[str, Tensor] = field(default_factory=dict)

    def edit(self, name: str, grad: Tensor, delta: Tensor) -> Tensor:
        """g - omega * p; p is kept, zero where it was not to be taken."""
        h, p_prev = 0.0, self.last.get(name, torch.zeros_like(grad))
        if bool(p_prev.any()) and bool(grad.any()):
            h = float((grad * p_prev).sum() / (grad.norm() * p_prev.norm()))
        moved = self.hyper.setdefault(name, ScalarAdam()).move(h, 1e-2)
        omega = self.omega[name] = min(1.0, max(0.0, self.omega.get(name, 0.0) + moved))
        dot = float((grad * delta).sum())
        away = dot < 0 and bool(delta.any())
        p = self.last[name] = dot / float((delta * delta).sum()) * delta if away else torch.zeros_like(grad)
        return grad - omega * p
