"""FQN patterns -> the settings of each layer: pure functions over names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sharded_spd.config import AnchorConfig, LayerConfig, SPDConfig
from sharded_spd.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from sharded_spd.rules.base import Rule


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerOptions:
    """What holds for one layer; nothing is left to inherit. `max_pull` None: no limit."""

    rule: str | Rule
    rule_options: Mapping[str, Any]
    weight_decay: float
    max_pull: float | None
    anchor: AnchorConfig


def resolve_layers(fqns: Sequence[str], config: SPDConfig) -> dict[str, LayerOptions]:
    """Settle each layer's settings: those of the first pattern that matches its whole FQN, else the general.

    Raises:
        ConfigError: a pattern that matches no layer, or only layers that an earlier pattern has taken.
    """
    owners: dict[str, LayerConfig] = {}
    for index, layer in enumerate(config.layers):
        pattern = re.compile(layer.pattern)
        matched = [fqn for fqn in fqns if pattern.fullmatch(fqn)]
        if not matched:
            raise ConfigError(_no_match(index, layer.pattern, fqns))
        free = [fqn for fqn in matched if fqn not in owners]
        if not free:
            takers = sorted({owners[fqn].pattern for fqn in matched})
            raise ConfigError(
                f"layers[{index}].pattern: {layer.pattern!r} has no effect: every layer that it matches "
                f"({_some(matched)}) is taken by an earlier pattern ({_some(takers)}); the first match wins, "
                "so put it first or narrow the other"
            )
        owners.update(dict.fromkeys(free, layer))
    return {fqn: _merge(owners.get(fqn), config) for fqn in fqns}


def _merge(layer: LayerConfig | None, config: SPDConfig) -> LayerOptions:
    """Fill what `layer` leaves open with the general settings; another rule does not inherit the options."""
    rule = config.rule if layer is None or layer.rule is None else layer.rule
    inherited: Mapping[str, Any] = config.rule_options if rule == config.rule else {}
    return LayerOptions(
        rule=rule,
        rule_options=inherited if layer is None or layer.rule_options is None else layer.rule_options,
        weight_decay=config.weight_decay
        if layer is None or layer.weight_decay is None
        else layer.weight_decay,
        max_pull=config.max_pull if layer is None or layer.max_pull is None else layer.max_pull,
        anchor=config.anchor if layer is None or layer.anchor is None else layer.anchor,
    )


def _no_match(index: int, pattern: str, fqns: Sequence[str]) -> str:
    # Escapes and wildcards of the pattern would only disturb the comparison with names.
    literal = re.sub(r"\\(.)", r"\1", pattern.replace(".*", ""))
    near = difflib.get_close_matches(literal, fqns, n=3, cutoff=0.3)
    near += [fqn for fqn in fqns if re.search(pattern, fqn) and fqn not in near][:3]
    closest = f"; the closest: {', '.join(near)}" if near else ""
    return (
        f"layers[{index}].pattern: {pattern!r} matches no layer; it must match a whole name (re.fullmatch), "
        f"as in '.*{literal.strip('.')}.*'; got {len(fqns)} layers: {_some(fqns)}{closest}"
    )


def _some(names: Sequence[str], limit: int = 8) -> str:
    more = f", ... ({len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def check_scalars(fqn: str, lr: Any, weight_decay: Any, max_pull: Any) -> None:
    """Whether a step's live scalars of one layer can be used.

    Raises:
        UnsupportedError: where its param group has no learning rate.
        ConfigError: for a strength or a limit out of range.
    """
    if lr is None:
        raise UnsupportedError(
            f"layer {fqn!r}: its param group has no 'lr'; wanted a learning rate: give the base optimizer "
            "one (for Adafactor: relative_step=False)"
        )
    if not isinstance(weight_decay, Tensor) and not weight_decay >= 0:
        raise ConfigError(f"layer {fqn!r}: got weight_decay {weight_decay}; wanted lambda >= 0")
    if not isinstance(max_pull, Tensor) and not max_pull > 0:
        raise ConfigError(
            f"layer {fqn!r}: got max_pull {max_pull}; wanted a number > 0, or None for no limit"
        )
