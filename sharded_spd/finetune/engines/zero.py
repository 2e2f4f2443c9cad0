"""The job under DeepSpeed, whose JSON says which ZeRO stage, offload and precision."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sharded_spd.errors import ConfigError
from sharded_spd.finetune.config import TrainConfig
from sharded_spd.finetune.engines.base import Engine
from sharded_spd.finetune.engines.zero_loading import partition
from sharded_spd.finetune.world import free_port
from sharded_spd.integrations.deepspeed import disable_shm_op, import_deepspeed

_OURS = {
    "optimizer": "the job makes its own AdamW, see `train`",
    "scheduler": "the job has its own schedule, see `train.schedule`",
    "sharded_spd": "the job has its own block `spd`",
}


@dataclass(frozen=True, kw_only=True)
class DeepSpeedOptions:
    """DeepSpeed's own JSON: the path of a file, and settings on top of it.

    The batch size, clipping and learning rate are the job's: `train_*` keys of the JSON are not read, and a
    clipping that differs from `train.max_grad_norm` is refused.
    """

    config: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> dict[str, Any]:
        """The whole JSON.

        Raises:
            ConfigError: the file cannot be read, is not a JSON object, or sets what the job sets.
        """
        found: Any = {}
        if self.config:
            try:
                found = json.loads(Path(self.config).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ConfigError(f"config: {self.config} cannot be read as JSON: {error}") from None
        if not isinstance(found, dict):
            raise ConfigError(f"config: {self.config} holds a {type(found).__name__}; wanted an object")
        whole = {**found, **self.settings}
        for key, reason in _OURS.items():
            if key in whole:
                raise ConfigError(f"config: has a block {key!r}, but {reason}; take it out")
        if whole.get("gradient_accumulation_steps", 1) not in (1, "auto"):
            raise ConfigError(
                f"config: gradient_accumulation_steps is {whole['gradient_accumulation_steps']}; take it out "
                "and set train.gradient_accumulation"
            )
        return whole


class DeepSpeed(Engine):
    """ZeRO, as the JSON says; below stage 3 each rank has the whole model until DeepSpeed takes over."""

    options = DeepSpeedOptions
    in_background = False

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model itself, until `prepare`."""
        if not torch.distributed.is_initialized():
            raise ConfigError(
                "engine: deepspeed needs a launcher's ranks: set ranks: 2 or more, or start with deepspeed, "
                "torchrun or accelerate launch"
            )
        self.json = self.options_given.load()
        self.module = model
        self._engine: Any = None
        self._set_up()
        if self.weights is not None:
            partition(model, self.weights, self._whole_json(), self.world)
        return model

    @classmethod
    def check(cls, options: Any, train: TrainConfig) -> None:
        """Whether the JSON clips as the job does.

        Raises:
            ConfigError: it does not.
        """
        given = options.load().get("gradient_clipping", "auto")
        if given not in ("auto", train.max_grad_norm or 0.0):
            raise ConfigError(
                f"engine.config: gradient_clipping is {given}, train.max_grad_norm {train.max_grad_norm}; "
                'wanted the same in both, or "auto" in the JSON'
            )

    @classmethod
    def loads_shards(cls, options: Any) -> bool:
        """At stage 3, unless parameters go to NVMe."""
        zero = options.load().get("zero_optimization", {})
        return bool(zero.get("stage") == 3) and zero.get("offload_param", {}).get("device") != "nvme"

    @property
    def named_model(self) -> nn.Module:
        """The module inside of DeepSpeed's engine."""
        return self.module

    def prepare(self, optimizer: torch.optim.Optimizer) -> Any:
        """Have DeepSpeed take over model and optimizer.

        Raises:
            ConfigError: the JSON's clipping differs from the job's, or DeepSpeed refuses the JSON.
        """
        deepspeed = import_deepspeed()
        whole = self._whole_json()
        try:
            self._engine, *_ = deepspeed.initialize(model=self.module, optimizer=optimizer, config=whole)
        except (ValueError, AssertionError, NotImplementedError, TypeError) as error:
            raise ConfigError(f"engine.config: DeepSpeed refuses it: {error}") from error
        self.model = self._engine
        self.module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
        return self._engine

    def _set_up(self) -> None:
        if self.world.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        alone = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        for key, value in alone.items():
            os.environ.setdefault(key, value)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        import_deepspeed()
        if self.world.device.type == "cpu":
            disable_shm_op()

    def _whole_json(self) -> dict[str, Any]:
        """The user's JSON with the job's own settings."""
        config = self.train
        clip = config.max_grad_norm or 0.0
        whole = {key: value for key, value in self.json.items() if not key.startswith("train_")}
        whole |= {"gradient_clipping": clip, "gradient_accumulation_steps": config.gradient_accumulation}
        share = -(-config.batch_size // self.world.size)
        whole["train_micro_batch_size_per_gpu"] = -(-share // config.gradient_accumulation)
        whole.setdefault("zero_force_ds_cpu_optimizer", False)  # the job's AdamW is kept under offload
        if config.precision == "bfloat16" and "fp16" not in whole:
            whole.setdefault("bf16", {"enabled": True})
        return whole

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of DeepSpeed itself."""
        return nullcontext()

    @property
    def _sharded(self) -> bool:
        return self._engine is not None and self._engine.zero_optimization_stage() == 3

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """DeepSpeed's own, which averages over the ranks; it counts the parts of a step by their `step`."""
        self._engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self._engine.step()

    def step(self, optimizer: torch.optim.Optimizer, *, max_grad_norm: float | None) -> Any:
        """DeepSpeed's own: it clips as its configuration says, and clears the gradients."""
        # Stage 0 in float32 keeps no norm of its own.
        plain = not hasattr(self._engine.optimizer, "_global_grad_norm")
        norm = self.clip(math.inf) if plain else None
        self._engine.step()
        return norm if plain else self._engine.get_global_grad_norm()

    def local_tensors(self) -> dict[str, Tensor]:
        """This rank's partition of each parameter at stage 3, else the whole parameters."""
        return dict(self._local())

    def _local(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            if not self._sharded:
                yield name, parameter.detach()
                continue
            part: Any = parameter
            length = part.partition_numel()
            start = torch.distributed.get_rank(part.ds_process_group) * length
            yield name, part.ds_tensor.detach()[: max(0, min(length, part.ds_numel - start))]

    def sum_over_shards(self, values: Tensor) -> Tensor:
        """Summed over all ranks if each holds another part."""
        return self.world.sum_(values) if self._sharded else values


def _cast_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs in the model's own precision: DeepSpeed casts the weights alone."""
    dtype = next(module.parameters()).dtype

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(cast(a) for a in args), {key: cast(value) for key, value in kwargs.items()}
