"""The job's configuration: one YAML file, frozen dataclasses, `key=value` overrides on the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sharded_spd.config import AnchorConfig, LayerConfig, SPDConfig, load_config
from sharded_spd.config.loading import build, choice, parse_yaml, read_yaml, wrong
from sharded_spd.errors import ConfigError
from sharded_spd.finetune.world import Device
from sharded_spd.rules import make_rule

PLAIN = "adamw"
"""The method that is torch's AdamW and nothing else."""

FROM_CHECKPOINT = "checkpoint"
"""As an anchor's source: the job's own checkpoint, of which each rank reads its slices."""


JSONL = "jsonl"
"""metrics.jsonl, which is always written: the report is made from it."""

TRACKERS = (JSONL, "tensorboard", "wandb", "mlflow")
"""The values of `track`: libraries by their own name, which is also that of the extra."""

_ADDED_BY_LORA = r".*\.lora_.*"

_SHORT_FORMS = {"engine": "name", "data": "name", "anchor": "source"}
"""Blocks that may be given as one word, and the key that the word stands for."""


_USUAL = {"data": "files"}
"""Blocks whose name is optional, and its default."""


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Options of peft's `LoraConfig`; `target_modules` are the model's usual ones if empty.

    `modules_to_save` are trained in full, next to a frozen copy, and anchored as without LoRA.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise wrong("r", "1 or more", self.r)
        if not 0 <= self.dropout < 1:
            raise wrong("dropout", "a share in [0, 1)", self.dropout)


@dataclass(frozen=True, kw_only=True)
class NamedBlock:
    """A choice by name, with options: `fsdp2`, or `{name: fsdp2, param_dtype: bfloat16}`."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, value: object, path: str) -> NamedBlock:
        """Read a bare name or a mapping with `name` and the options."""
        if isinstance(value, str):
            return cls(name=value)
        if isinstance(value, Mapping) and path in _USUAL:
            value = {"name": _USUAL[path], **value}
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise wrong(path, "a name, or a mapping with `name` and its options", value)
        return cls(name=value["name"], options={k: v for k, v in value.items() if k != "name"})


@dataclass(frozen=True, kw_only=True)
class StoppingConfig:
    """End a training when a metric has not improved by `min_delta` in `patience` evaluations.

    `set`: the validation set if there is one, else the test set, or the name of an OOD set. The last weights
    are saved.
    """

    patience: int = 3
    metric: str | None = None
    set: str | None = None
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise wrong("patience", "1 evaluation or more", self.patience)
        if not 0 <= self.min_delta < math.inf:
            raise wrong("min_delta", "a finite number, 0 or more", self.min_delta)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and optimization. `batch_size` counts all ranks and all `gradient_accumulation` micro-batches.

    `max_steps` ends the training earlier than `epochs`. Evaluate every `evaluate_every` steps, or else
    `evaluations` times, evenly. `precision` is that of forward and backward; the weights stay float32 except
    under DeepSpeed, which keeps float32 masters. `adamw_weight_decay` is that of plain AdamW.
    """

    epochs: int = 10
    max_steps: int | None = None
    batch_size: int = 32
    gradient_accumulation: int = 1
    lr: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    adamw_weight_decay: float = 0.01
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0
    max_grad_norm: float | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False
    compile: bool = False
    evaluations: int = 5
    evaluate_every: int | None = None
    early_stopping: StoppingConfig | None = None
    log_every: int = 1

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "gradient_accumulation", "evaluations", "log_every"):
            if getattr(self, name) < 1:
                raise wrong(name, "1 or more", getattr(self, name))
        for name in ("max_steps", "evaluate_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise wrong(name, "1 or more, or null", getattr(self, name))
        for name in ("lr", "eps", "adamw_weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise wrong(name, "a finite number, 0 or more", getattr(self, name))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise wrong("betas", "two numbers in [0, 1)", self.betas)
        if not 0 <= self.warmup < 1:
            raise wrong("warmup", "a share of all steps in [0, 1)", self.warmup)
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise wrong("max_grad_norm", "a positive number or null", self.max_grad_norm)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """How to make the checkpoint: a model from its Hugging Face configuration, trained on augmented data."""

    model: Mapping[str, Any]
    train: TrainConfig
    model_type: str = "vit"
    engine: NamedBlock = NamedBlock(name="ddp")
    augment: str = "broad"
    seed: int = 0
    min_accuracy: float = 0.0
    cache_dir: str | None = None


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Which lambdas to try per method, with which seeds, and how the validation accuracy decides.

    `seeds`: all of the job's if empty.
    """

    weight_decay: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    rule: Literal["one-standard-error", "best"] = "one-standard-error"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How a training in progress is saved, for `--resume`.

    `every`: steps between checkpoints (0: only when a signal stops the job). `keep_last`: how many are kept.
    `asynchronous`: write them in the background.
    """

    every: int = 0
    keep_last: int = 2
    asynchronous: bool = False

    def __post_init__(self) -> None:
        if self.every < 0:
            raise wrong("every", "a number of steps, 0 or more", self.every)
        if self.keep_last < 1:
            raise wrong("keep_last", "1 or more", self.keep_last)


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """All settings of a fine-tuning job.

    `compare`: `adamw`, which is torch's own, and rules by name; the rule of `spd` alone if empty.
    `checkpoint`: a directory, or a hub name. `load`: whether each rank reads its shards only; "auto": if the
    engine can. `metrics`: methods are compared by the first one; the task's default if empty.
    `classes`: names for a new head (the checkpoint's own head if empty). `head_first`: train the head alone
    first, with these settings (LP-FT); the result is its anchor. `spd`: an `SPDConfig` mapping whose
    anchor defaults to the checkpoint. `track`: where figures go in addition to metrics.jsonl.
    """

    data: NamedBlock
    task: str = "image-classification"
    checkpoint: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    load: Literal["auto", "sharded", "whole"] = "auto"
    lora: LoraOptions | None = None
    metrics: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    pretrain: PretrainConfig | None = None
    engine: NamedBlock = NamedBlock(name="single")
    ranks: int = 1
    device: Device = "auto"
    output_dir: str = "runs/finetune"
    seeds: tuple[int, ...] = (0,)
    compare: tuple[str, ...] = ()
    train: TrainConfig = TrainConfig()
    head_first: TrainConfig | None = None
    eval_batch_size: int = 256
    spd: Mapping[str, Any] = field(default_factory=dict)
    select: SelectConfig = SelectConfig()
    save: Literal["all", "first-seed", "none"] = "all"
    checkpointing: CheckpointConfig = CheckpointConfig()
    track: tuple[str, ...] = ("jsonl",)

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.pretrain is None):
            raise ConfigError(
                "checkpoint: give the directory of a checkpoint, or `pretrain` to make one (not both)"
            )
        for name in ("ranks", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise wrong(name, "1 or more", getattr(self, name))
        if self.lora is not None and self.pretrain is not None:
            raise ConfigError("lora: needs an existing checkpoint; it cannot go with `pretrain`")
        if self.lora is not None and self.head_first is not None:
            raise ConfigError("head_first: is for full fine-tuning; it cannot go with `lora`")
        for name in self.track:
            if name not in TRACKERS:
                raise choice("track", name, TRACKERS)
        if not self.compare:
            object.__setattr__(self, "compare", (str(self.spd.get("rule", "spd")),))
        for name in ("seeds", "compare"):
            values: tuple[Any, ...] = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise wrong(name, "at least one entry and none twice", values)
        for method in self.compare:
            if method != PLAIN:
                self.spd_config(method)
        for method, candidates in self.select.weight_decay.items():
            if not candidates:
                raise wrong(f"select.weight_decay.{method}", "at least one strength", candidates)
            for strength in candidates:
                self.spd_config(method, strength)

    def spd_config(self, method: str, strength: float | None = None) -> SPDConfig:
        """The `spd` block for the rule `method` and a lambda; options go to the block's own rule only."""
        block = {"anchor": FROM_CHECKPOINT, **self.spd}
        if isinstance(block["anchor"], Mapping):
            block["anchor"] = {"source": FROM_CHECKPOINT, **block["anchor"]}
        if method != block.get("rule", "spd"):
            block.pop("rule_options", None)
        block["rule"] = method
        if strength is not None:
            block["weight_decay"] = strength
        try:
            spd = load_config(block)
            spd = spd if self.lora is None else _anchored_at_zero(spd)
            make_rule(spd.rule, spd.rule_options)  # its name and options are checked now, not on the ranks
        except ConfigError as error:
            raise ConfigError(f"spd, for {method}: {error}") from None
        return spd

    def to_json(self) -> str:
        """Every setting, defaults included, for the record of a run."""
        return json.dumps(asdict(self), indent=1)


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read the YAML file of a job and apply `key=value` overrides.

    A key may reach into blocks (`train.lr=1e-4`), a value is YAML; `@FILE` is the content of a YAML file.

    Raises:
        ConfigError: a file that cannot be read, an unknown key (with the nearest known name), a bad value.
    """
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise wrong(str(path), "a YAML file with settings", data)
    for override in overrides:
        _override(data, override)
    try:
        return build(JobConfig, data)
    except ConfigError as error:
        where = f"{path} with {' '.join(overrides)}" if overrides else str(path)
        raise ConfigError(f"{where}: {error}") from None


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"{override}: wanted key=value, such as train.lr=1e-4")
    block: Any = data
    for depth, name in enumerate(names[:-1]):
        below = block.setdefault(name, {})
        if isinstance(below, str) and name in _SHORT_FORMS:
            below = block[name] = {_SHORT_FORMS[name]: below}
        if not isinstance(below, dict):
            raise ConfigError(
                f"{override}: {'.'.join(names[: depth + 1])} is {below!r}, it has no settings of its own"
            )
        block = below
    block[names[-1]] = read_yaml(text[1:]) if text.startswith("@") else parse_yaml(text)


def _anchored_at_zero(spd: SPDConfig) -> SPDConfig:
    """The settings with the added weights anchored at zero, unless a user's pattern matches first."""
    return replace(
        spd, layers=(*spd.layers, LayerConfig(pattern=_ADDED_BY_LORA, anchor=AnchorConfig(source="zero")))
    )
