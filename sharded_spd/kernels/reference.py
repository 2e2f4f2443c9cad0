"""The reference path: plain torch, chunk by chunk, on any device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from sharded_spd.anchors.base import Values
from sharded_spd.stats import CHUNK


def _pull_chunk(weight: Tensor, anchor: Tensor | None, s: Tensor) -> Tensor:
    # Half precision is worked on in float32, so that s is not rounded to 8 bits first.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    w, s = weight.to(dtype), s.to(dtype)
    if anchor is None:
        pulled = w * (1 - s)
    else:
        pulled = torch.lerp(w, anchor.to(device=w.device, dtype=dtype, non_blocking=True), s)
    return pulled.to(weight.dtype)


@torch.no_grad()
def pull_(weight: Tensor, anchor: Values | None, s: Tensor) -> None:
    """w <- w - s * (w - w0) (modified in place); where s is 0, or the result not finite, the bits stay.

    Args:
        weight: 1-D, the slice.
        anchor: 1-D values of the slice; None for zero.
        s: float64, 0-d for the whole slice, or one value per element.
    """
    on_host = s.device.type == "cpu" and s.dim() == 0
    if on_host and s == 0:  # reading a CPU tensor waits for nothing
        return
    for begin in range(0, weight.numel(), CHUNK):
        end = begin + CHUNK
        part = weight[begin:end]
        s_part = s if s.dim() == 0 else s[begin:end]
        pulled = _pull_chunk(part, None if anchor is None else anchor[begin:end], s_part)
        # An infinite weight has no way back: lerp makes it NaN.
        part.copy_(torch.where((s_part != 0) & torch.isfinite(pulled), pulled, part))
