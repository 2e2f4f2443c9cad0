"""What a model costs in a step, found by a pass over tensors that have shapes only."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sharded_spd.finetune.data.examples import Batch
from sharded_spd.finetune.engines.blocks import blocks_of
from sharded_spd.finetune.tasks.registry import Task


@dataclass(frozen=True)
class Shape:
    """Parameters, and what one part of a step takes on one rank; None where it cannot be told.

    `outside`: parameters in no block, such as embeddings. `activations`: bytes kept for the backward in
    float32. `flops`: of forward and backward.
    """

    parameters: int
    trained: int
    largest_block: int
    outside: int
    activations: float | None
    flops: float | None


def measure(task: Task, model: nn.Module, batch: Batch) -> Shape:
    """The shape of a training step on `batch`; `model` is left on the meta device."""
    every = list(model.parameters())
    blocks = blocks_of(model, ())
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    total = sum(p.numel() for p in every)
    activations, flops = _pass(task, model, batch)
    return Shape(
        total,
        sum(p.numel() for p in every if p.requires_grad),
        max(sizes, default=total),
        max(0, total - sum(sizes)) if sizes else 0,
        activations,
        flops,
    )


def _pass(task: Task, model: nn.Module, batch: Batch) -> tuple[float | None, float | None]:
    model = copy.deepcopy(model).to("meta").train()
    owned = {id(p) for p in model.parameters()}
    kept: dict[int, tuple[Any, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(tensor) not in owned and (tensor._base is None or id(tensor._base) not in owned):
            kept[storage._cdata] = (storage, tensor.numel() * tensor.element_size())
        return tensor

    mode = FakeTensorMode(allow_non_fake_inputs=True)  # models look into masks, but not into fake ones
    counter = FlopCounterMode(display=False)
    try:
        with mode, counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            described = {name: tensor.to("meta") for name, tensor in batch.items()}
            loss = task.losses(model, described).sum()
            activations = float(sum(size for _, size in kept.values()))
            loss.backward()
    except Exception:  # an architecture that looks at values, in whatever way
        return None, None
    return activations, float(counter.get_total_flops())
