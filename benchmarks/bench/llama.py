"""The layers of a Llama on the meta device, and how they are split over ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes as in the model's configuration; the defaults are those of Llama 3 70B: 70.6 B in 723 tensors."""

    blocks: int = 80
    hidden: int = 8192
    inner: int = 28672
    heads: int = 64
    kv_heads: int = 8
    vocabulary: int = 128256


THIN = Shape(hidden=256, inner=896, vocabulary=4008)
"""As many tensors, a thousandth of the values: what is left is the cost of the layout itself."""


class _Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))


class _Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden, key = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(hidden, hidden, bias=False),
                "k_proj": nn.Linear(hidden, key, bias=False),
                "v_proj": nn.Linear(hidden, key, bias=False),
                "o_proj": nn.Linear(hidden, hidden, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(hidden, shape.inner, bias=False),
                "up_proj": nn.Linear(hidden, shape.inner, bias=False),
                "down_proj": nn.Linear(shape.inner, hidden, bias=False),
            }
        )
        self.input_layernorm, self.post_attention_layernorm = _Norm(hidden), _Norm(hidden)


class Llama(nn.Module):
    """The parameters alone: a layout and an optimizer's step need no forward."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(_Block(shape) for _ in range(shape.blocks))
        self.norm = _Norm(shape.hidden)
        self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)


_PLAN = {
    **{f"self_attn.{name}_proj": ColwiseParallel() for name in ("q", "k", "v")},
    "self_attn.o_proj": RowwiseParallel(),
    "mlp.gate_proj": ColwiseParallel(),
    "mlp.up_proj": ColwiseParallel(),
    "mlp.down_proj": RowwiseParallel(),
}

REPLICAS, TENSOR_PARALLEL = 4, 8


def split(model: Llama, engine: str, world: int) -> None:
    """Shard a model on the meta device over all ranks (modified in place)."""
    if engine == "hsdp":
        mesh = init_device_mesh("cpu", (REPLICAS, world // REPLICAS), mesh_dim_names=("replicate", "shard"))
    elif engine == "fsdp2+tp":
        whole = init_device_mesh(
            "cpu", (world // TENSOR_PARALLEL, TENSOR_PARALLEL), mesh_dim_names=("shard", "tensor")
        )
        mesh = whole["shard"]
        for block in model.layers:
            parallelize_module(block, whole["tensor"], _PLAN)
    else:
        mesh = init_device_mesh("cpu", (world,))
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def elements_per_rank(elements: int, engine: str, world: int) -> int:
    """About; tensor parallelism leaves embedding, head and norms to the other axis."""
    ranks = world // REPLICAS if engine == "hsdp" else world
    return int(elements / ranks * (1.3 if engine == "fsdp2+tp" else 1.0))
