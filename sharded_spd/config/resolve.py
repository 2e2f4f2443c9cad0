"""Patterns and sources -> the settings of each layer, and the anchor that each name stands for."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharded_spd.anchors import AnchorStore, FileAnchor, MappedAnchor, TensorAnchor, ZeroAnchor
from sharded_spd.binding.records import LayerSettings
from sharded_spd.config import AnchorConfig, LayerConfig, SPDConfig
from sharded_spd.errors import AnchorError, BindingError, ConfigError
from sharded_spd.rules import Rule, make_rule
from sharded_spd.sharding.layout import ShardLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerOptions:
    """The resolved settings of one layer; nothing is inherited any more. `max_pull` None: no limit."""

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
    """Fill unset fields of `layer` with the general settings; another rule does not inherit the options."""
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
    # The pattern's escapes and wildcards would only distort the comparison with names.
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


Source = str | os.PathLike[str] | AnchorStore


def open_source(
    source: Source,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    missing: Any = "raise",
    *,
    on_disk: bool = False,
    names: Mapping[str, str] | None = None,
) -> AnchorStore | Literal["snapshot"]:
    """The store of an anchor source; "deferred" is a snapshot that is taken later.

    `on_disk` leaves the values of a path in their files; `names` are the layers' there.
    """
    if isinstance(source, AnchorStore):
        return source
    if not isinstance(source, (str, os.PathLike)):
        wanted = '"snapshot", "deferred", "zero", the path of a safetensors checkpoint, or an AnchorStore'
        raise ConfigError(f"got anchor {source!r}; wanted {wanted}")
    source = os.fspath(source)
    if source == "pre":
        raise ConfigError(
            "got anchor 'pre', which only says that a group's anchors were given; give them as 'pre' again"
        )
    if source in ("snapshot", "deferred"):
        return "snapshot"
    if source == "zero":
        return ZeroAnchor()
    return (MappedAnchor if on_disk else FileAnchor)(source, dtype, missing, names)


def source_name(source: Source) -> str:
    """A source's name in a param group."""
    return source.source if isinstance(source, AnchorStore) else os.fspath(source)


def _refuse_unnamed(what: str, layout: ShardLayout) -> None:
    raise ConfigError(
        f"{what} needs the layers' names, but the parameters came without: {layout.fqns[0]!r} is made up; "
        "pass model.named_parameters() to the optimizer, or model=..."
    )


@dataclass(slots=True)
class GroupSpec:
    """What a param group asked for that is no scalar; `pre`: anchors in the order of its parameters.

    `shown` is what the group itself says of them: names and the anchors' fingerprint. `unchecked` is the
    fingerprint of a checkpoint that was loaded while lambda was 0, and is compared once it is not.
    """

    rule: Rule
    anchor: AnchorStore | Literal["snapshot"]
    pre: Sequence[Tensor | None] | None = None
    shown: dict[str, str] = field(default_factory=dict)
    unchecked: str | None = None


class GroupResolver:
    """Settings from an optimizer's own param groups."""

    def __init__(self, optimizer: Optimizer, specs: Sequence[GroupSpec]) -> None:
        self._optimizer = optimizer
        self._specs = specs

    def __call__(
        self, layout: ShardLayout, owners: Mapping[str, Mapping[str, Any]], named: bool
    ) -> dict[str, LayerSettings]:
        """Each layer's settings; see `binding.Resolver`."""
        settings: dict[str, LayerSettings] = {}
        if len(self._specs) != len(self._optimizer.param_groups):
            raise BindingError(
                f"the optimizer has {len(self._optimizer.param_groups)} param groups, but "
                f"{len(self._specs)} were added through add_param_group; add and keep groups through it"
            )
        for spec, group in zip(self._specs, self._optimizer.param_groups, strict=True):
            fqns = [fqn for fqn in layout.fqns if owners[fqn] is group]
            anchor = spec.anchor
            if spec.pre is not None:
                if len(fqns) != len(spec.pre):
                    raise AnchorError(
                        f"'pre' has {len(spec.pre)} anchors for {len(fqns)} layers: a flat parameter holds "
                        "several; anchor at a checkpoint's path, or at TensorAnchor({name: tensor})"
                    )
                anchor = TensorAnchor(dict(zip(fqns, spec.pre, strict=True)), source="pre")
            elif isinstance(anchor, FileAnchor) and not named and spec.rule.spec.anchored:
                _refuse_unnamed(f"anchor {anchor.source}", layout)
            settings.update({fqn: LayerSettings(rule=spec.rule, anchor=anchor) for fqn in fqns})
        return settings


class ConfigResolver:
    """Settings from an `SPDConfig`."""

    def __init__(self, config: SPDConfig) -> None:
        self._config = config
        self._rules: dict[str, Rule] = {}
        self._stores: dict[str, AnchorStore | Literal["snapshot"]] = {}
        make_rule(config.rule, config.rule_options)
        for layer in config.layers:
            if layer.rule is not None:
                make_rule(layer.rule, layer.rule_options)

    def __call__(
        self, layout: ShardLayout, owners: Mapping[str, Mapping[str, Any]], named: bool
    ) -> dict[str, LayerSettings]:
        """Each layer's settings; see `binding.Resolver`."""
        if self._config.layers and not named:
            _refuse_unnamed("a pattern under layers", layout)
        settings = {}
        resolved = resolve_layers([*layout.fqns, *layout.elsewhere], self._config)
        for fqn in layout.fqns:
            own = resolved[fqn]
            rule = self._rule(own.rule, own.rule_options)
            anchor = self._store(own.anchor) if rule.spec.anchored else "snapshot"
            if isinstance(anchor, FileAnchor) and not named:
                _refuse_unnamed(f"anchor {anchor.source}", layout)
            dtype = None if own.anchor.dtype == "auto" else getattr(torch, own.anchor.dtype)
            settings[fqn] = LayerSettings(
                rule=rule,
                anchor=anchor,
                weight_decay=own.weight_decay,
                max_pull=own.max_pull,
                anchor_dtype=dtype,
                anchor_on_cpu=own.anchor.device == "cpu",
                fingerprint=own.anchor.fingerprint,
            )
        return settings

    def _rule(self, rule: str | Rule, options: Mapping[str, Any]) -> Rule:
        # One instance for all layers of a kind: the projector keeps one set of statistics per instance.
        if not isinstance(rule, str):
            return make_rule(rule, options)
        return self._rules.setdefault(f"{rule}{sorted(options.items())}", make_rule(rule, options))

    def _store(self, anchor: AnchorConfig) -> AnchorStore | Literal["snapshot"]:
        if isinstance(anchor.source, AnchorStore):
            return anchor.source
        on_disk = anchor.device == "disk"
        names = anchor.names or self._config.names
        key = f"{anchor.source}:{anchor.dtype}:{on_disk}:{list(names.items())}"
        if key not in self._stores:
            missing = self._config.anchor_missing
            self._stores[key] = open_source(
                anchor.source, anchor.dtype, missing, on_disk=on_disk, names=names
            )
        return self._stores[key]
