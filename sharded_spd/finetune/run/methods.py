"""The methods that a job compares: plain AdamW, or AdamW with a rule attached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sharded_spd.anchors.files import FileAnchor
from sharded_spd.anchors.mapped import MappedAnchor
from sharded_spd.config import AnchorConfig, SPDConfig
from sharded_spd.finetune.config import FROM_CHECKPOINT, PLAIN, JobConfig, TrainConfig
from sharded_spd.finetune.engines.base import Engine
from sharded_spd.finetune.tasks.checkpoint import RenamedAnchor
from sharded_spd.optim.attach import attach
from sharded_spd.projection.projector import Projector


@dataclass(frozen=True)
class Method:
    """A method's name and its strength; None: plain AdamW, which has none."""

    name: str
    weight_decay: float | None = None

    @property
    def label(self) -> str:
        """Name and strength, for tables and messages."""
        return self.name if self.weight_decay is None else f"{self.name} (λ {self.weight_decay:g})"


def make_optimizer(engine: Engine, config: TrainConfig, *, weight_decay: float) -> torch.optim.Optimizer:
    """Torch's fused AdamW over every parameter that is trained."""
    return torch.optim.AdamW(
        [(name, p) for name, p in engine.named_model.named_parameters() if p.requires_grad],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        weight_decay=weight_decay,
        fused=True,
    )


def set_up(
    method: Method,
    engine: Engine,
    config: JobConfig,
    *,
    checkpoint: Path,
    names: Mapping[str, str],
    head: Mapping[str, torch.Tensor],
) -> tuple[torch.optim.Optimizer, Projector | None]:
    """The optimizer of `method`, with its rule attached unless it is plain AdamW. Collective.

    `names`: FQN to the stored name in `checkpoint`, the anchor unless the `spd` block says otherwise. `head`:
    the layers that were trained before and are anchored at what came out.
    """
    plain = method.name == PLAIN
    decay = config.train.adamw_weight_decay if plain else 0.0
    optimizer = make_optimizer(engine, config.train, weight_decay=decay)
    target = engine.prepare(optimizer)
    if isinstance(target, torch.optim.Optimizer):
        optimizer = target
    if plain:
        return optimizer, None
    spd = _with_anchor(config.spd_config(method.name, method.weight_decay), checkpoint, names, head)
    return optimizer, attach(target, engine.named_model, spd)


def _with_anchor(
    spd: SPDConfig, checkpoint: Path, names: Mapping[str, str], head: Mapping[str, torch.Tensor]
) -> SPDConfig:
    def located(anchor: AnchorConfig) -> AnchorConfig:
        if anchor.source != FROM_CHECKPOINT:
            return anchor
        make = MappedAnchor if anchor.device == "disk" else FileAnchor
        store = RenamedAnchor(make(checkpoint, anchor.dtype, spd.anchor_missing), names, head)
        return replace(anchor, source=store)

    layers = tuple(
        layer if layer.anchor is None else replace(layer, anchor=located(layer.anchor))
        for layer in spd.layers
    )
    return replace(spd, anchor=located(spd.anchor), layers=layers)
