"""What the package is measured against, written here: the published loop, the naive form, a copy of bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

BETAS, EPS = (0.9, 0.999), 1e-8
_PIECE = 1 << 28


class PublishedLoop:
    """The published algorithm as one writes it for one device: layer by layer, a host decision in each."""

    def __init__(self, params: Sequence[Parameter], anchors: Sequence[Tensor], lr: float, decay: float):
        self._layers = [(p, a, torch.zeros_like(p), torch.zeros_like(p)) for p, a in zip(params, anchors)]  # noqa: B905
        self._lr, self._decay, self._count = lr, decay, 0
        self.num_pulled = 0

    @torch.no_grad()
    def step(self) -> None:
        self._count += 1
        self.num_pulled = 0
        beta1, beta2 = BETAS
        step_size = self._lr / (1 - beta1**self._count)
        root = math.sqrt(1 - beta2**self._count)
        for p, anchor, mean, square in self._layers:
            grad = p.grad
            if grad is None:
                continue
            mean.mul_(beta1).add_(grad, alpha=1 - beta1)
            square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            new = p - step_size * mean / (square.sqrt() / root + EPS)
            condition = -(grad * (p - anchor)).sum()
            if condition.item() < 0:
                before, after = torch.norm(p - anchor), torch.norm(new - anchor)
                ratio = torch.clamp((after - before) / after, 0, 1)
                new = new - self._decay * ratio * (new - anchor)
                self.num_pulled += 1
            p.copy_(new)


class NaiveDTensor:
    """The projection in DTensor arithmetic around torch's fused AdamW: three sums, hence reductions, a layer.

    Nothing waits for the host; on one process these are plain tensors.
    """

    def __init__(self, params: Sequence[Parameter], anchors: Sequence[Tensor], lr: float, decay: float):
        self._base = torch.optim.AdamW(params, lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)
        self._layers = list(zip(params, anchors, strict=True))
        self._decay = decay
        self._pulls: list[Tensor] = []

    @property
    def num_pulled(self) -> int:
        return sum(bool(s > 0) for s in self._pulls)

    @torch.no_grad()
    def step(self) -> None:
        seen = []
        for p, anchor in self._layers:
            delta = p - anchor
            seen.append((_whole((p.grad * delta).sum()), _whole(torch.linalg.vector_norm(delta))))
        self._base.step()
        self._pulls = []
        for (p, anchor), (dot, before) in zip(self._layers, seen, strict=True):
            delta = p - anchor
            after = _whole(torch.linalg.vector_norm(delta))
            ratio = torch.clamp((after - before) / after, 0, 1)
            s = torch.where(dot > 0, self._decay * ratio, 0.0).to(p.dtype)
            p.sub_(delta * s)
            self._pulls.append(s)


def _whole(value: Tensor) -> Tensor:
    """A sum over all ranks: DTensor reduces it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


class Copy:
    """Moves as many bytes as AdamW must: half read, half written, in pieces that no cache holds."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        half = max(num_bytes // 2, 1)
        piece = min(half, _PIECE)
        self._from = torch.ones(piece, dtype=torch.uint8, device=device)
        self._to = torch.zeros(piece, dtype=torch.uint8, device=device)
        self._pieces = [piece] * (half // piece) + ([half % piece] if half % piece else [])
        self.num_bytes = 2 * half

    def step(self) -> None:
        for size in self._pieces:
            self._to[:size].copy_(self._from[:size])
