"""Adam on one number per layer: how a rule learns a radius or a share from its hyper-gradient."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor

STATE = ("hyper_mean", "hyper_square", "hyper_steps")
"""The `layer_state` that `adam_step` keeps, all zero at first."""


def adam_step(state: MutableMapping[str, Tensor], gradient: Tensor, *, lr: float) -> Tensor:
    """What to add to the learned number: Adam's step (Kingma and Ba, 2015), betas 0.9 and 0.999, eps 1e-8.

    Args:
        state: holds `STATE`, float64 `[num_layers]` each; gets new tensors, none is changed in place.
        gradient: float64 `[num_layers]`; 0 counts as a step, too.
        lr: the step size.
    """
    steps = state["hyper_steps"] + 1
    mean = torch.lerp(gradient, state["hyper_mean"], 0.9)
    square = 0.999 * state["hyper_square"] + 0.001 * gradient * gradient
    state.update(hyper_mean=mean, hyper_square=square, hyper_steps=steps)
    root = (square / (1 - 0.999**steps)).sqrt()
    return -lr * mean / (1 - 0.9**steps) / (root + 1e-8)
