"""A probe model under a real DeepSpeed engine, whose gradients are exactly what a test asks for."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_spd import AdamSPD, SPDConfig, attach
from sharded_spd.projection.projector import Projector
from tests.reference.oracle import LayerOptions
from tests.support.models import Probe
from tests.support.training import adam_spd_groups

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16_opt": torch.bfloat16, "fp16": torch.float16}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the JSON says and how the package is used.

    `dtype` "bf16_opt" is DeepSpeed's BF16_Optimizer. `zero` goes into the block zero_optimization, `top`
    stands beside it. With a `folder` the JSON is a file there. `block` is an optimizer for the JSON instead
    of a client's. `form` as in `Training`.
    """

    stage: int
    dtype: str = "fp32"
    zero: Mapping[str, Any] = field(default_factory=dict)
    top: Mapping[str, Any] = field(default_factory=dict)
    form: str = "attached"
    block: Mapping[str, Any] | None = None
    init: bool = False
    accumulate: int = 1
    clip: float = 0.0
    base: type[torch.optim.Optimizer] = torch.optim.Adam
    scheduler: Any = None
    folder: Path | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """What the model computes in."""
        return DTYPES[self.dtype]

    def config(self) -> dict[str, Any]:
        """The whole JSON."""
        result: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.accumulate,
            "gradient_clipping": self.clip,
            "zero_optimization": {"stage": self.stage, **self.zero},
        }
        if self.stage == 3:
            result["zero_optimization"].setdefault("stage3_param_persistence_threshold", 0)
        if self.dtype.startswith("bf16"):
            result["bf16"] = {"enabled": True}
        if self.dtype == "bf16_opt":
            result["data_types"] = {"grad_accum_dtype": "fp32"}
        if self.dtype == "fp16":
            result["fp16"] = {"enabled": True, "initial_scale_power": 4}
        if (
            self.form == "adam_spd"
            or self.base is not torch.optim.Adam
            or (self.block or {}).get("type") == "SGD"
        ):
            result["zero_allow_untested_optimizer"] = True
        if self.block is not None:
            result["optimizer"] = dict(self.block)
        elif "offload_optimizer" in self.zero:
            result["zero_force_ds_cpu_optimizer"] = False
        for key, value in self.top.items():
            result[key] = {**result.get(key, {}), **value} if isinstance(value, Mapping) else value
        return result


def mixed_groups(
    params: Mapping[str, torch.nn.Parameter], options: Mapping[str, LayerOptions]
) -> list[dict[str, Any]]:
    """Groups of what the base has to treat alike, whatever their rules."""
    groups: dict[Any, list[torch.nn.Parameter]] = {}
    for name, p in params.items():
        o = options[name]
        groups.setdefault((o.lr, o.betas, o.eps), []).append(p)
    return [{"params": own, "lr": lr, "betas": betas, "eps": eps} for (lr, betas, eps), own in groups.items()]


def set_up() -> Any:
    """DeepSpeed, for a process whose group exists already."""
    os.environ.update(
        RANK=str(dist.get_rank()),
        LOCAL_RANK=str(dist.get_rank()),
        WORLD_SIZE=str(dist.get_world_size()),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",
        DS_ACCELERATOR="cpu",
    )
    known = "deepspeed" in sys.modules
    import deepspeed
    import deepspeed.ops

    if not known:
        from deepspeed.accelerator import get_accelerator

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # It asks for fast kernels; this machine computes in float16 all the same.
        get_accelerator().is_fp16_supported = lambda: True
        deepspeed.init_distributed("gloo")
    return deepspeed


def _written(setting: Setting, folder: Path) -> str:
    path = folder / f"ds{dist.get_rank()}.json"
    path.write_text(json.dumps(setting.config()))
    return str(path)


class ZeroTraining:
    """An engine around a probe of `tensors`, and the projector attached to it.

    The layers of `leave_out` are not given to the optimizer.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        options: LayerOptions | Mapping[str, LayerOptions],
        setting: Setting,
        *,
        config: SPDConfig | None = None,
        ties: Mapping[str, str] | None = None,
        frozen: Sequence[str] = (),
        leave_out: Sequence[str] = (),
        attached: bool = True,
    ) -> None:
        self.setting = setting
        deepspeed = set_up()
        model = Probe(tensors, ties=ties)
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        if setting.init:
            deepspeed.zero.Init(module=model, config_dict_or_path=setting.config())
        named = {name: p for name, p in model.named_parameters() if name not in leave_out}
        of = {n: options if isinstance(options, LayerOptions) else options[n] for n in named}
        optimizer: torch.optim.Optimizer | None = None
        if setting.form == "adam_spd":
            anchor = "deferred" if config is None else config.anchor.source
            optimizer = AdamSPD(adam_spd_groups(named, of), anchor=anchor)
        elif setting.block is None:
            optimizer = setting.base(mixed_groups(named, of))
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=[p for p in model.parameters() if p.requires_grad]
            if optimizer is None
            else None,
            lr_scheduler=setting.scheduler,
            config=setting.config() if setting.folder is None else _written(setting, setting.folder),
        )
        self.started = self.masters()
        self.steps = 0
        self.projector: Projector
        if attached:
            self.projector = attach(self.engine, config=None if setting.form == "adam_spd" else config)

    @property
    def base(self) -> torch.optim.Optimizer:
        """What DeepSpeed steps in the end."""
        wrapper = self.engine.optimizer
        return wrapper if isinstance(wrapper, torch.optim.Optimizer) else wrapper.optimizer

    def step(self, grads: Mapping[str, Tensor]) -> None:
        """Backward and step; one rank supplies the gradients, so that reducing them matters."""
        self.backward(grads)
        self.engine.step()
        self.steps += 1

    def backward(self, grads: Mapping[str, Tensor]) -> None:
        """All of a step but the last update."""
        world = dist.get_world_size()
        mine = self.steps % world == dist.get_rank()
        sent = {
            name: (g * world if mine else torch.zeros_like(g)).to(self.setting.torch_dtype)
            for name, g in grads.items()
        }
        for micro in range(self.setting.accumulate):
            self.engine.backward(self.engine(sent).float())
            if micro < self.setting.accumulate - 1:
                self.engine.step()

    def masters(self) -> dict[str, Tensor]:
        """The whole layers as the optimizer has them, through DeepSpeed's own accessors; collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        found = {}
        wrapper = self.engine.optimizer
        unfused = {}
        if hasattr(wrapper, "fp32_groups"):
            for low, high in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
                unfused.update(zip(low, high, strict=True))
        if hasattr(wrapper, "fp32_groups_flat"):  # the same around a fused optimizer: a flat per group
            for low, flat in zip(wrapper.fp16_groups, wrapper.fp32_groups_flat, strict=True):
                unfused.update(zip(low, flat.split([p.numel() for p in low]), strict=True))
        for name, p in self.engine.module.named_parameters():
            if not p.requires_grad:
                continue
            plain = self.setting.dtype == "fp32" and self.setting.stage < 3
            # DeepSpeed's accessor is wrong with round_robin_gradients; in fp32 the weights are the masters.
            full = unfused.get(p, p) if plain or p in unfused else safe_get_full_fp32_param(p)
            found[name] = full.detach().clone().view(getattr(p, "ds_shape", p.shape))
        return found

    def close(self) -> None:
        """Give the engine's memory and hooks back."""
        self.projector.detach()
        self.engine.destroy()
