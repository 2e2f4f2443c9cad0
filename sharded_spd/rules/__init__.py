"""Rules: how reduced statistics become the pull. Pure tensor maths: no engine, no collective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

from sharded_spd.errors import ConfigError, did_you_mean
from sharded_spd.rules.base import LayerInfo, Options, Rule, RuleSpec, Stats
from sharded_spd.rules.cwd import CWD
from sharded_spd.rules.decay import Decay, NoRule
from sharded_spd.rules.digrap import DiGraP
from sharded_spd.rules.ftp import FTP
from sharded_spd.rules.l2sp import L2SP
from sharded_spd.rules.maps import MAPS
from sharded_spd.rules.mars_sp import MARSSP
from sharded_spd.rules.spd import SPD

__all__ = [
    "CWD",
    "FTP",
    "L2SP",
    "MAPS",
    "MARSSP",
    "SPD",
    "Decay",
    "DiGraP",
    "LayerInfo",
    "NoRule",
    "Options",
    "Rule",
    "RuleSpec",
    "Stats",
    "make_rule",
    "register",
]

_R = TypeVar("_R", bound=type[Rule])

_RULES: dict[str, type[Rule]] = {
    rule.name: rule for rule in (SPD, L2SP, FTP, MAPS, CWD, MARSSP, DiGraP, Decay, NoRule)
}


def register(rule: _R) -> _R:
    """Register your own rule by its `name`, for configurations and param groups; a class decorator.

    Every process that reads the configuration has to do it, before it does.

    Raises:
        ConfigError: for what is no rule's class, and for a name that another rule has.
    """
    name, spec = getattr(rule, "name", None), getattr(rule, "spec", None)
    whole = isinstance(rule, type) and isinstance(name, str) and isinstance(spec, RuleSpec)
    if not (whole and is_dataclass(rule)):
        raise ConfigError(
            f"got {rule!r}; wanted the class of a rule, a dataclass with a `name` and a `spec` (@register "
            "stands above @dataclass)"
        )
    known = _RULES.get(name, rule)
    if (known.__module__, known.__qualname__) != (rule.__module__, rule.__qualname__):
        raise ConfigError(
            f"got {rule.__qualname__} named {name!r}; {known.__qualname__} has that name, choose another"
        )
    _RULES[name] = rule  # or the same again, when a notebook cell is rerun
    return rule


def make_rule(rule: str | Rule, options: Mapping[str, Any] | None = None) -> Rule:
    """The rule of that name, created with `options`; an instance is returned as it is.

    Raises:
        ConfigError: for an unknown name or an unknown option, with the nearest known one; for an option that
            is missing or out of range.
    """
    options = dict(options or {})
    if not isinstance(rule, str):
        if options:
            raise ConfigError(
                f"got rule_options {sorted(options)} beside the rule instance {rule!r}; pass the options to "
                "the instance's constructor instead"
            )
        if not isinstance(getattr(rule, "spec", None), RuleSpec):
            raise ConfigError(
                f"got rule {rule!r}; wanted a rule's name ({', '.join(_RULES)}) or an instance of one"
            )
        return rule
    if rule not in _RULES:
        hint = did_you_mean(rule, _RULES)
        raise ConfigError(f"unknown rule {rule!r}; wanted one of {', '.join(_RULES)}{hint}")
    own = [f for f in fields(_RULES[rule]) if f.init]  # type: ignore[arg-type]
    known = [f.name for f in own]
    for key in options:
        if key not in known:
            hint = did_you_mean(key, known)
            wanted = f"one of {known}" if known else "none: this rule has no options"
            raise ConfigError(f"unknown option {key!r} of rule {rule!r}; wanted {wanted}{hint}")
    missing = [f.name for f in own if f.default is MISSING and f.name not in options]
    if missing:
        raise ConfigError(
            f"rule {rule!r} needs its option {missing[0]!r}; give it as rule_options: {{{missing[0]}: ...}}, "
            f"or the instance as rule={_RULES[rule].__name__}({missing[0]}=...)"
        )
    return _RULES[rule](**options)
