"""A model without values under ZeRO-3: partitioned module by module, then filled with each rank's slices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sharded_spd.finetune.tasks.loading import Weights, places
from sharded_spd.finetune.world import World
from sharded_spd.integrations.deepspeed import import_deepspeed
from sharded_spd.sharding.layout import FlatRange

_LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


def partition(model: nn.Module, weights: Weights, config: Mapping[str, Any], world: World) -> None:
    """Partition a model of the meta device as `zero.Init` does (modified in place). Collective.

    At no time does a rank hold more than its partition and the parameters of one module, without values.

    Raises:
        AnchorError: a file is damaged; on all ranks.
    """
    deepspeed = import_deepspeed()
    low = next((dtype for key, dtype in _LOW.items() if config.get(key, {}).get("enabled")), None)
    for parameter, spots in places(model).items():
        room = torch.empty(parameter.shape, dtype=low or parameter.dtype, device=world.device)
        made = nn.Parameter(room, requires_grad=parameter.requires_grad)
        for module, name, _ in spots:
            module._parameters[name] = made
        alone = nn.Module()
        alone.register_parameter("only", made)
        deepspeed.zero.Init(module=alone, config_dict_or_path=_for_init(config))
    world.agree(lambda: _fill(model, weights))


def _for_init(config: Mapping[str, Any]) -> dict[str, Any]:
    zero = {"memory_efficient_linear": False, **config.get("zero_optimization", {})}
    return {**config, "zero_optimization": zero}


@torch.no_grad()
def _fill(model: nn.Module, weights: Weights) -> None:
    for name, parameter in model.named_parameters():
        part: Any = parameter
        length = part.partition_numel()
        start = torch.distributed.get_rank(part.ds_process_group) * length
        own = max(0, min(length, part.ds_numel - start))
        values = weights.read(name, tuple(part.ds_shape), FlatRange(start), own)
        part.ds_tensor.zero_()  # what fills up the last partition
        part.ds_tensor[:own].copy_(values)
