"""Adam with Selective Projection Decay in float64, one process, one tensor at a time: slow and obvious."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOptions:
    """The hyper-parameters of one layer."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    rule: str = "spd"
    max_pull: float | None = None


@dataclass(frozen=True, slots=True)
class LayerStats:
    """What the rule saw and did in one step: `n0 = |w - w0|`, `n1 = |w~ - w0|`, ratio `r`, pull `s`."""

    c: float
    n0: float
    n1: float
    r: float
    s: float


def pull(
    before: Tensor, grad: Tensor, tentative: Tensor, anchor: Tensor, options: LayerOptions
) -> tuple[Tensor, LayerStats]:
    """The weights after the rule, and its statistics; all tensors float64 and of one shape.

    SPD: `w~ - lambda * r * (w~ - w0)` where `c = -<g, w - w0> < 0` and `r = clamp((n1 - n0) / n1, 0, 1)`.
    """
    c = -float((grad * (before - anchor)).sum())
    n0 = float((before - anchor).norm())
    n1 = float((tentative - anchor).norm())
    ratio = min(max((n1 - n0) / n1, 0.0), 1.0) if n1 > 0 else 0.0
    if options.rule == "spd":
        s = options.weight_decay * ratio if c < 0 else 0.0
    elif options.rule == "l2sp":
        s = options.lr * options.weight_decay
    else:
        s = 0.0
    if options.max_pull is not None:
        s = min(s, options.max_pull)
    if not all(map(math.isfinite, (c, n0, n1, s))):
        s = 0.0
    weights = tentative if s == 0 else tentative - s * (tentative - anchor)
    return weights, LayerStats(c, n0, n1, ratio, s)


@dataclass
class Oracle:
    """Trains `weights` (copied, float64) with Adam and the rule of each layer.

    `anchors` without a layer's name anchor it at zero. `step` takes the layers' gradients; a layer without
    one is left alone, its step count included.
    """

    weights: dict[str, Tensor]
    anchors: Mapping[str, Tensor]
    options: Mapping[str, LayerOptions] | LayerOptions
    amsgrad: bool = False
    maximize: bool = False
    exp_avg: dict[str, Tensor] = field(default_factory=dict)
    exp_avg_sq: dict[str, Tensor] = field(default_factory=dict)
    max_exp_avg_sq: dict[str, Tensor] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Copies everything, so that nothing here is shared with what is tested."""
        self.weights = {name: w.detach().double().clone() for name, w in self.weights.items()}
        self.anchors = {name: a.detach().double().clone() for name, a in self.anchors.items()}

    def of(self, name: str) -> LayerOptions:
        """The options of one layer."""
        return self.options if isinstance(self.options, LayerOptions) else self.options[name]

    def step(self, grads: Mapping[str, Tensor]) -> dict[str, LayerStats]:
        """One step on the layers that have a gradient; their statistics."""
        stats = {}
        for name, given in grads.items():
            grad, before = given.detach().double(), self.weights[name]
            grad = -grad if self.maximize else grad  # of what is minimised, for Adam and for the condition
            anchor = self.anchors.get(name, torch.zeros_like(before))
            tentative = self._adam(name, grad)
            self.weights[name], stats[name] = pull(before, grad, tentative, anchor, self.of(name))
        return stats

    def _adam(self, name: str, grad: Tensor) -> Tensor:
        options, w = self.of(name), self.weights[name]
        if options.rule == "decay":
            w = w * (1 - options.lr * options.weight_decay)
        beta1, beta2 = options.betas
        t = self.count[name] = self.count.get(name, 0) + 1
        zero = torch.zeros_like(w)
        m = self.exp_avg[name] = beta1 * self.exp_avg.get(name, zero) + (1 - beta1) * grad
        v = self.exp_avg_sq[name] = beta2 * self.exp_avg_sq.get(name, zero) + (1 - beta2) * grad * grad
        if self.amsgrad:
            v = self.max_exp_avg_sq[name] = torch.maximum(self.max_exp_avg_sq.get(name, zero), v)
        return w - options.lr / (1 - beta1**t) * m / (v.sqrt() / math.sqrt(1 - beta2**t) + options.eps)


class BaseOracle:
    """The rule around any torch optimizer: a second instance of it steps plain, whole copies of the layers.

    Weights are rounded to their own dtype after the base step and after the pull, as stored weights are.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        anchors: Mapping[str, Tensor],
        options: Mapping[str, LayerOptions] | LayerOptions,
        make_base: Callable[[dict[str, torch.nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        self.params = {name: torch.nn.Parameter(w.detach().clone()) for name, w in weights.items()}
        self.anchors = {name: a.detach().double().clone() for name, a in anchors.items()}
        self.options = options
        self.base = make_base(self.params)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The layers now."""
        return {name: p.detach() for name, p in self.params.items()}

    def step(self, grads: Mapping[str, Tensor]) -> dict[str, LayerStats]:
        """One step of the base on the layers that have a gradient, then the rule."""
        before = {name: p.detach().double().clone() for name, p in self.params.items()}
        for name, p in self.params.items():
            p.grad = grads[name].detach().to(p.dtype).clone() if name in grads else None
        self.base.step()
        stats = {}
        for name, grad in grads.items():
            options = self.options if isinstance(self.options, LayerOptions) else self.options[name]
            p = self.params[name]
            anchor = self.anchors.get(name, torch.zeros_like(before[name]))
            weights, stats[name] = pull(
                before[name], grad.detach().double(), p.detach().double(), anchor, options
            )
            with torch.no_grad():
                p.copy_(weights)
        return stats
