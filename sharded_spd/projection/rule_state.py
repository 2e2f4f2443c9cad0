"""Moves the rules' state into and out of checkpoints, and from one binding to the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sharded_spd.binding.records import cut
from sharded_spd.engines.base import EngineAdapter
from sharded_spd.errors import BindingError
from sharded_spd.projection.layers import LayerTable

Layers = dict[str, dict[str, Any]]
"""By FQN: "layer.NAME" a 0-d float64 tensor, "shard.NAME" a tensor like the parameter."""

Moves = list[tuple[Tensor, Tensor]]
"""Pairs of a target and its new value."""


def export_layers(plans: Iterable[LayerTable], adapter: EngineAdapter) -> Layers:
    """The state of every layer whose rule has any; the same keys on every rank."""
    layers: Layers = {}
    for plan in plans:
        for rule_layers in plan.rules:
            for i, fqn in enumerate(rule_layers.fqns):
                state = {f"layer.{name}": values[i].clone() for name, values in rule_layers.state.items()}
                for name, values in plan.shard_states.get(fqn, {}).items():
                    state[f"shard.{name}"] = adapter.export(fqn, values)
                if state:
                    layers[fqn] = state
    return layers


def stateful_layers(plans: Iterable[LayerTable]) -> dict[str, None]:
    """The layers whose rule declares state."""
    specs = [(rule_layers.fqns, rule_layers.rule.spec) for plan in plans for rule_layers in plan.rules]
    return {fqn: None for fqns, spec in specs if spec.layer_state or spec.shard_state for fqn in fqns}


def find_layers(plans: Iterable[LayerTable], adapter: EngineAdapter, layers: Mapping[str, Any]) -> Moves:
    """Pair each part of exported state with its target; changes nothing.

    Raises:
        BindingError: layer state is not one number, or a shard has another size: it was saved for another
            layout and not resharded.
    """
    moves: Moves = []
    for plan in plans:
        for rule_layers in plan.rules:
            for i, fqn in enumerate(rule_layers.fqns):
                saved = layers.get(fqn, {})
                for name, values in rule_layers.state.items():
                    if f"layer.{name}" not in saved:
                        continue
                    number = torch.as_tensor(saved[f"layer.{name}"])
                    if number.numel() != 1:
                        raise BindingError(
                            f"layer {fqn!r}: the checkpoint's rule state {name!r} has {number.numel()} "
                            "elements, wanted one number: it is damaged, or of another rule"
                        )
                    moves.append((values[i], number.reshape(())))
                for name, values in plan.shard_states.get(fqn, {}).items():
                    if f"shard.{name}" not in saved:
                        continue
                    local = adapter.restore(fqn, saved[f"shard.{name}"])
                    if local.numel() != values.numel():
                        raise BindingError(
                            f"layer {fqn!r}: the checkpoint's rule state {name!r} has {local.numel()} "
                            f"elements for this rank, wanted {values.numel()}; load it through "
                            "torch.distributed.checkpoint, which reshards it"
                        )
                    moves.append((values, local))
    return moves


def move_layers(
    old: Iterable[LayerTable],
    new: Iterable[LayerTable],
    shapes: Mapping[str, tuple[int, ...]],
    renamed: Mapping[str, str],
) -> None:
    """Carry state from the plans of one binding to those of the next (modified in place)."""
    targets = {fqn: (plan, *plan.layers_of[fqn]) for plan in new for fqn in plan.fqns}
    for plan in old:
        for fqn in plan.fqns:
            name = renamed.get(fqn, fqn)
            if name not in targets:
                continue
            target, rule_layers, i = targets[name]
            source, j = plan.layers_of[fqn]
            for key in rule_layers.state.keys() & source.state.keys():
                rule_layers.state[key][i] = source.state[key][j]
            for key, values in plan.shard_states.get(fqn, {}).items():
                if key in target.shard_states.get(name, {}):
                    piece = target.pieces[name]
                    target.shard_states[name][key].copy_(
                        cut(values, plan.pieces[fqn], piece, shapes[name])[:]
                    )
