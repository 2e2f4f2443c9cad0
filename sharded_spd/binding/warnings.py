"""Warnings, each given once: settings that work but are rarely intended."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence

import torch

from sharded_spd.anchors.paths import some
from sharded_spd.binding.records import Binding
from sharded_spd.sharding.layout import BoundShard

_LOG = logging.getLogger(__name__)


def about_excess(pull: float) -> None:
    """Warn about a pull above 1."""
    warnings.warn(
        f"a layer was pulled by {pull:.3g} times its deviation: above 1 it overshoots its anchor; lower "
        "weight_decay, or set max_pull=1.0",
        stacklevel=2,
    )


def about_telemetry(path: str | None, error: OSError) -> None:
    """Warn about a line that could not be written."""
    warnings.warn(
        f"telemetry.path: {path} cannot be written ({error.strerror or error}): lines are lost until it "
        "can; training goes on",
        stacklevel=2,
    )


def about_anchors(binding: Binding) -> None:
    """Report anchors that are not the tensor of the layer's own name, for layers bound for the first time."""
    notes, binding.found.notes = binding.found.notes, []
    for note in notes:
        warnings.warn(note, stacklevel=2)
    renamed = [f"{fqn} <- {key}" for fqn, key in binding.names.items() if key not in (None, fqn)]
    if renamed:
        _LOG.info("%d layers have another name in the anchor's file: %s", len(renamed), some(renamed, 3))


def about_start(binding: Binding, shards: Sequence[BoundShard]) -> None:
    """Warn, at the first step, about a run that does not start at its anchor; `shards` are those that step.

    A base optimizer with state was resumed, so its weights may have moved: no warning.
    """
    moved = list(binding.found.differs_from_weights)
    binding.found.differs_from_weights.clear()
    if any(shard.has_state for shard in shards):
        return
    warnings.warn(
        f"the model does not start at its anchor: {len(moved)} layer(s) have other weights than the anchor's "
        f"files ({some(moved, 3)}): another revision, or a fine-tuned checkpoint, instead of the pre-trained "
        "one? When resuming, load the optimizer's or the projector's state too",
        stacklevel=2,
    )


def about_kernels(unlike: Mapping[str, Sequence[str]]) -> None:
    """Warn about ranks with different kernels, by device type: replicas would drift apart bit by bit."""
    for device_type, names in unlike.items():
        warnings.warn(
            f"the ranks have different kernels for {device_type} tensors ({', '.join(names)}): all of them "
            "use plain torch, which is slower; give every node the same C compiler or Triton, or set "
            "SHARDED_SPD_KERNELS=reference",
            stacklevel=2,
        )


def about_binding(binding: Binding, shards: Sequence[BoundShard]) -> None:
    """Warn about lambda 0 everywhere, half-precision weights, and a base that decays what a rule pulls."""
    strengths, half, decayed = [], [], []
    for shard in shards:
        for piece in shard.slices:
            layer, group = binding.options[piece.layer], shard.param_group
            strength = float(group["weight_decay"] if layer.weight_decay is None else layer.weight_decay)
            alone = layer.rule.spec.decays  # has no lambda: the base is meant to decay
            if layer.rule.spec.pulls:
                strengths.append(1.0 if alone else strength)
            if not (layer.rule.spec.pulls and layer.rule.spec.anchored and (alone or strength > 0)):
                continue
            if shard.tensor.dtype in (torch.bfloat16, torch.float16):
                half.append(piece.layer)
            if not alone and layer.weight_decay is not None and float(group.get("weight_decay") or 0.0) > 0:
                decayed.append(piece.layer)
    if strengths and not any(strengths):
        warnings.warn(
            "weight_decay (lambda) is 0 for every layer: this is plain Adam (or the plain base optimizer)",
            stacklevel=2,
        )
    if binding.found.lossy:
        warnings.warn(
            f"the anchor's dtype changed the values of {len(binding.found.lossy)} layer(s) "
            f"({some(binding.found.lossy, 3)}), on this rank by up to {binding.found.worst:.2g} of a "
            "value (inf: out of range); dtype: auto keeps the source's",
            stacklevel=2,
        )
    if half:
        warnings.warn(
            f"{len(half)} layer(s) are in half precision without float32 masters (e.g. {half[0]!r}): "
            "pulls below one unit in the last place vanish; keep float32 parameters and use mixed "
            "precision for compute",
            stacklevel=2,
        )
    if decayed:
        warnings.warn(
            f"the base optimizer decays {len(decayed)} layer(s) toward zero that a rule pulls toward the "
            f"anchor (e.g. {decayed[0]!r}): set the base's weight_decay to 0 there; lambda is "
            "SPDConfig.weight_decay",
            stacklevel=2,
        )
