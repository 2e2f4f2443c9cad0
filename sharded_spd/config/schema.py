"""The configuration: frozen keyword-only dataclasses that check themselves, however they are made.

Every message opens with the key that it speaks of, so that the loader can put the key's path before it.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeGuard

from sharded_spd.anchors.base import AnchorStore, is_on_disk
from sharded_spd.config.loading import build, read_yaml, settle, shown, wrong
from sharded_spd.errors import ConfigError
from sharded_spd.rules.base import Rule
from sharded_spd.sharding.names import check_rules


def _source(value: object, path: str) -> str | AnchorStore:
    found = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(found, AnchorStore) or (isinstance(found, str) and found):
        return found
    raise wrong(path, '"snapshot", "deferred", "zero", a path or an AnchorStore', value)


def _rule(value: object, path: str) -> Any:
    # Names are looked up in the rules' registry when the rule is made; here only the kind of value is known.
    if (isinstance(value, str) and value) or hasattr(value, "spec"):
        return value
    raise wrong(path, "the name of a rule or a rule object", value)


def _strength(value: object, path: str) -> float:
    if not _is_number(value) or not 0 <= value < math.inf:
        raise wrong(path, "a finite number, 0 or more", value)
    return float(value)


def _pull_limit(value: object, path: str) -> float:
    if not _is_number(value) or not value > 0:
        raise wrong(path, "a positive number, or null for no limit", value)
    return float(value)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _fingerprint(value: object, path: str) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-fA-F]{32}", value):
        # YAML reads digits alone, or with one e, as a number, not a string.
        raise wrong(path, "32 hexadecimal digits in quotes, as sharded-spd anchor info prints them", value)
    return value.lower()


def _pattern(value: object, path: str) -> str:
    if not isinstance(value, str) or not value:
        raise wrong(path, "a regular expression", value)
    try:
        re.compile(value)
    except re.error as error:
        hint = "; it is a regular expression, not a glob: any text is .*" if "*" in value else ""
        raise ConfigError(f"{path}: {value!r} is not a valid regular expression: {error}{hint}") from None
    return value


def _num_steps(value: object, path: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise wrong(path, "a number of steps, 0 or more (0: off)", value)
    return value


def _file(value: object, path: str) -> str:
    found = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(found, str) or not found:
        raise wrong(path, "the path of a file to write", value)
    return found


Source = Annotated[str | AnchorStore, _source]
RuleChoice = Annotated[str | Rule, _rule]
Strength = Annotated[float, _strength]
PullLimit = Annotated[float, _pull_limit]
Fingerprint = Annotated[str, _fingerprint]
Pattern = Annotated[str, _pattern]


@dataclass(frozen=True, kw_only=True, slots=True)
class AnchorConfig:
    r"""Where the pre-trained values come from and how they are kept.

    `source`: "snapshot" (the weights at binding), "deferred" (bound later by `bind()`), "zero", the path of
    a safetensors checkpoint (relative to the working directory), or an `AnchorStore`. `dtype` "auto" keeps
    the stored dtype. `device` "cpu" keeps the anchor in host memory, "disk" leaves it in its files.
    `fingerprint` is the one that the anchor ought to have: of the layers that it is for, or, where a manifest
    lies beside its files, of all in them. `names`: patterns on whole names of layers, and what each is called
    in the file ("student\.(.*)": "\1"); the first that matches wins, several may lead to one tensor.
    """

    source: Source = "snapshot"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "disk"] = "auto"
    fingerprint: Fingerprint | None = None
    names: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        settle(self)
        if self.device == "disk":
            _check_on_disk(self.source)
        if self.fingerprint is not None and self.source == "zero":
            raise ConfigError("fingerprint: source zero has no values to compare; leave it out")
        check_rules(self.names)
        if self.names and not self.has_file:
            raise ConfigError(
                f"names: say what layers are called in a file, but the source is {shown(self.source)}; "
                "wanted the path of a checkpoint (an anchor store has its own: FileAnchor(path, names=...))"
            )

    @classmethod
    def load(cls, value: object, path: str) -> AnchorConfig:
        """Read a bare source or a mapping."""
        if isinstance(value, (str, os.PathLike, AnchorStore)):
            value = {"source": value}
        if not isinstance(value, Mapping):
            raise wrong(path, "a source or a mapping with source, dtype, device", value)
        return build(cls, value, path)

    @property
    def has_file(self) -> bool:
        """Whether the source is a path."""
        return isinstance(self.source, str) and self.source not in ("snapshot", "deferred", "zero")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerConfig:
    """Settings of the layers whose whole FQN `pattern` matches (`re.fullmatch`); None: as for the others.

    `anchor` may be given as a bare source.
    """

    pattern: Pattern
    rule: RuleChoice | None = None
    rule_options: Mapping[str, Any] | None = None
    weight_decay: Strength | None = None
    max_pull: PullLimit | None = None
    anchor: AnchorConfig | None = None

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class TelemetryConfig:
    """Every how many steps the figures are fetched from the device (0: never), and the file they go to."""

    every: Annotated[int, _num_steps] = 0
    path: Annotated[str, _file] | None = None

    def __post_init__(self) -> None:
        settle(self)
        if self.path is not None and self.every == 0:
            raise ConfigError(
                "every: is 0 (off) although a path is given: nothing would be written; set every"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SPDConfig:
    """Everything that `attach` can be told; the defaults are SPD as published, at lambda 1, from a snapshot.

    `rule`: a rule's name or object. `weight_decay`: lambda, the strength. `max_pull`: upper bound of the pull
    lambda * r. `anchor`: an `AnchorConfig` or its bare source. `anchor_missing`: whether a layer that an
    anchor file lacks is an error or anchored at zero. `names`: those of the anchors' files that have none of
    their own, see `AnchorConfig`. `layers`: settings by pattern, the first match wins.
    `reduction`: where an engine steps its optimizer several times per step (DeepSpeed), or several optimizers
    step one model, whether each has a reduction, or all have one together. `defer` is the old name of that.
    """

    rule: RuleChoice = "spd"
    rule_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    weight_decay: Strength = 1.0
    max_pull: PullLimit | None = None
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    anchor_missing: Literal["raise", "zero"] = "raise"
    names: Mapping[str, str] = field(default_factory=dict, hash=False)
    layers: tuple[LayerConfig, ...] = ()
    reduction: Literal["per_inner_step", "per_step"] = "per_inner_step"
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    defer: bool | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        settle(self)
        if self.defer is not None:
            object.__setattr__(self, "reduction", _reduction(self.defer, self.reduction))
            object.__setattr__(self, "defer", None)
        check_rules(self.names)
        anchors = [self.anchor, *(layer.anchor for layer in self.layers if layer.anchor is not None)]
        if self.names and not any(anchor.has_file for anchor in anchors):
            raise ConfigError(
                "names: say what layers are called in a file, but no anchor is the path of a checkpoint"
            )


def _reduction(defer: bool, reduction: str) -> str:
    """What the old name means."""
    meant = "per_step" if defer else "per_inner_step"
    if reduction not in ("per_inner_step", meant):
        raise ConfigError(f"defer: is {str(defer).lower()} and reduction {reduction}; wanted reduction alone")
    warnings.warn(
        f"defer: {str(defer).lower()} is reduction: {meant} now; the old name goes with the next release",
        FutureWarning,
        stacklevel=4,
    )
    return meant


def load_config(source: str | os.PathLike[str] | Mapping[str, Any]) -> SPDConfig:
    """Read the YAML file or the mapping `source`; an empty one gives the defaults.

    Raises:
        ConfigError: a key that is unknown (with the nearest known one), given twice or not a string; a value
            of the wrong type or out of range; a file that cannot be read. The message names the key's path.
    """
    if isinstance(source, Mapping):
        return build(SPDConfig, source)
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(f"wanted a path or a mapping, got {shown(source)}")
    data = read_yaml(source)
    try:
        return build(SPDConfig, {} if data is None else data)
    except ConfigError as error:
        raise ConfigError(f"{os.fspath(source)}: {error}") from None


def _check_on_disk(source: str | AnchorStore) -> None:
    stays = is_on_disk(source) or (isinstance(source, str) and source not in ("snapshot", "deferred"))
    if not stays:
        got = shown(source) if isinstance(source, str) else f"a store of {source.source!r}"
        raise ConfigError(
            f"device: disk reads the anchor from its file in every step, but the source is {got}, which "
            "keeps its values in memory: name the path of the pre-trained model's safetensors checkpoint, or "
            "say device: cpu to spare only the device's memory"
        )
