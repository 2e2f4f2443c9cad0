"""The configuration: frozen keyword-only dataclasses that validate themselves, and their strict loading.

Every message opens with the key that it speaks of, so that the loader can put the key's path before it.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sharded_spd.anchors.base import AnchorStore, is_on_disk
from sharded_spd.config.strict_yaml import read_yaml, unknown_key
from sharded_spd.errors import ConfigError, did_you_mean
from sharded_spd.sharding.names import check_rules

if TYPE_CHECKING:
    from sharded_spd.rules.base import Rule

T = TypeVar("T")


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

    source: str | AnchorStore = "snapshot"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "disk"] = "auto"
    fingerprint: str | None = None
    names: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if isinstance(self.source, os.PathLike):
            object.__setattr__(self, "source", os.fspath(self.source))
        if not isinstance(self.source, AnchorStore) and not (isinstance(self.source, str) and self.source):
            wanted = '"snapshot", "deferred", "zero", a path or an AnchorStore'
            raise ConfigError(_mismatch("source", wanted, self.source))
        _check_choice("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _check_choice("device", self.device, ("auto", "cpu", "disk"))
        if self.device == "disk":
            _check_on_disk(self.source)
        if self.fingerprint is not None:
            object.__setattr__(self, "fingerprint", _fingerprint(self.fingerprint, self.source))
        object.__setattr__(self, "names", check_rules(self.names))
        if self.names and not self.has_file:
            raise ConfigError(
                f"names: say what layers are called in a file, but the source is {_shown(self.source)}; "
                "wanted the path of a checkpoint (an anchor store has its own: FileAnchor(path, names=...))"
            )

    @property
    def has_file(self) -> bool:
        """Whether the source is a path."""
        return isinstance(self.source, str) and self.source not in ("snapshot", "deferred", "zero")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerConfig:
    """Settings of the layers whose whole FQN `pattern` matches (`re.fullmatch`); None: as for the others.

    `anchor` may be given as a bare source.
    """

    pattern: str
    rule: str | Rule | None = None
    rule_options: Mapping[str, Any] | None = None
    weight_decay: float | None = None
    max_pull: float | None = None
    anchor: AnchorConfig | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise ConfigError(_mismatch("pattern", "a regular expression", self.pattern))
        try:
            re.compile(self.pattern)
        except re.error as error:
            hint = "; it is a regular expression, not a glob: any text is .*" if "*" in self.pattern else ""
            message = f"pattern: {self.pattern!r} is not a valid regular expression: {error}{hint}"
            raise ConfigError(message) from None
        if self.rule is not None:
            _check_rule(self.rule)
        if self.rule_options is not None:
            object.__setattr__(self, "rule_options", _options("rule_options", self.rule_options))
        if self.weight_decay is not None:
            object.__setattr__(self, "weight_decay", _strength(self.weight_decay))
        object.__setattr__(self, "max_pull", _pull_limit(self.max_pull))
        if self.anchor is not None:
            object.__setattr__(self, "anchor", _anchor(self.anchor))


@dataclass(frozen=True, kw_only=True, slots=True)
class TelemetryConfig:
    """Every how many steps the figures are fetched from the device (0: never), and the file they go to."""

    every: int = 0
    path: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 0:
            raise ConfigError(_mismatch("every", "a number of steps, 0 or more (0: off)", self.every))
        if isinstance(self.path, os.PathLike):
            object.__setattr__(self, "path", os.fspath(self.path))
        if self.path is not None and not (isinstance(self.path, str) and self.path):
            raise ConfigError(_mismatch("path", "the path of a file to write", self.path))
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

    rule: str | Rule = "spd"
    rule_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    weight_decay: float = 1.0
    max_pull: float | None = None
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    anchor_missing: Literal["raise", "zero"] = "raise"
    names: Mapping[str, str] = field(default_factory=dict, hash=False)
    layers: tuple[LayerConfig, ...] = ()
    reduction: Literal["per_inner_step", "per_step"] = "per_inner_step"
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    defer: bool | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _check_rule(self.rule)
        object.__setattr__(self, "rule_options", _options("rule_options", self.rule_options))
        object.__setattr__(self, "weight_decay", _strength(self.weight_decay))
        object.__setattr__(self, "max_pull", _pull_limit(self.max_pull))
        object.__setattr__(self, "anchor", _anchor(self.anchor))
        if self.defer is not None:
            object.__setattr__(self, "reduction", _reduction(self.defer, self.reduction))
            object.__setattr__(self, "defer", None)
        _check_choice("reduction", self.reduction, ("per_inner_step", "per_step"))
        _check_choice("anchor_missing", self.anchor_missing, ("raise", "zero"))
        if not isinstance(self.layers, Sequence) or isinstance(self.layers, str):
            raise ConfigError(_mismatch("layers", "a list of LayerConfig", self.layers))
        object.__setattr__(self, "layers", tuple(self.layers))
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, LayerConfig):
                raise ConfigError(_mismatch(f"layers[{index}]", "a LayerConfig", layer))
        object.__setattr__(self, "names", check_rules(self.names))
        anchors = [self.anchor, *(layer.anchor for layer in self.layers if layer.anchor is not None)]
        if self.names and not any(anchor.has_file for anchor in anchors):
            raise ConfigError(
                "names: say what layers are called in a file, but no anchor is the path of a checkpoint"
            )
        if not isinstance(self.telemetry, TelemetryConfig):
            raise ConfigError(_mismatch("telemetry", "a TelemetryConfig", self.telemetry))


def _reduction(defer: Any, reduction: str) -> str:
    """What the old name means."""
    if not isinstance(defer, bool):
        raise ConfigError(_mismatch("defer", "true or false", defer))
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
        return _build(SPDConfig, source, "", _SECTIONS)
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(f"wanted a path or a mapping, got {_shown(source)}")
    data = read_yaml(source)
    try:
        return _build(SPDConfig, {} if data is None else data, "", _SECTIONS)
    except ConfigError as error:
        raise ConfigError(f"{os.fspath(source)}: {error}") from None


def _build(cls: type[T], data: Any, path: str, sections: Mapping[str, Callable[[Any, str], Any]]) -> T:
    """Make the dataclass `cls` of the mapping that stands at `path`; `sections` builds what nests in it."""
    if not isinstance(data, Mapping):
        raise ConfigError(_mismatch(path.rstrip(".") or "top level", "a mapping of settings", data))
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in data.items():
        if not isinstance(key, str):
            raise ConfigError(f"{path}{key}: keys are strings, got {_shown(key)}; quote it or correct it")
        if key not in known:
            raise unknown_key(key, known, path)
        values[key] = sections[key](value, f"{path}{key}") if key in sections else value
    for f in fields(cls):  # type: ignore[arg-type]
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"{path}{f.name}: is required")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}{error}") from None


def _build_anchor(data: Any, path: str) -> Any:
    return _build(AnchorConfig, data, f"{path}.", {}) if isinstance(data, Mapping) else data


def _build_layers(data: Any, path: str) -> Any:
    if not isinstance(data, Sequence) or isinstance(data, str):
        raise ConfigError(_mismatch(path, "a list of mappings with a pattern each", data))
    return tuple(
        layer
        if isinstance(layer, LayerConfig)
        else _build(LayerConfig, layer, f"{path}[{index}].", _LAYER_SECTIONS)
        for index, layer in enumerate(data)
    )


def _build_telemetry(data: Any, path: str) -> Any:
    return data if isinstance(data, TelemetryConfig) else _build(TelemetryConfig, data, f"{path}.", {})


_SECTIONS = {"anchor": _build_anchor, "layers": _build_layers, "telemetry": _build_telemetry}
_LAYER_SECTIONS = {"anchor": _build_anchor}


def _shown(value: object) -> str:
    return f"{value!r:.100} ({type(value).__name__})"


def _mismatch(name: str, wanted: str, got: object) -> str:
    return f"{name}: wanted {wanted}, got {_shown(got)}"


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        hint = did_you_mean(value, choices)
        raise ConfigError(_mismatch(name, "one of " + ", ".join(choices), value) + hint)


def _check_on_disk(source: str | AnchorStore) -> None:
    stays = is_on_disk(source) or (isinstance(source, str) and source not in ("snapshot", "deferred"))
    if not stays:
        got = _shown(source) if isinstance(source, str) else f"a store of {source.source!r}"
        raise ConfigError(
            f"device: disk reads the anchor from its file in every step, but the source is {got}, which "
            "keeps its values in memory: name the path of the pre-trained model's safetensors checkpoint, or "
            "say device: cpu to spare only the device's memory"
        )


def _check_rule(value: object) -> None:
    # Names are looked up in the rules' registry when the rule is made; here only the kind of value is known.
    if not (isinstance(value, str) and value) and not hasattr(value, "spec"):
        raise ConfigError(_mismatch("rule", "the name of a rule or a rule object", value))


def _number(name: str, value: object, wanted: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise ConfigError(_mismatch(name, wanted, value))
    return float(value)


def _strength(value: object) -> float:
    wanted = "a finite number, 0 or more"
    number = _number("weight_decay", value, wanted)
    if number < 0 or math.isinf(number):
        raise ConfigError(_mismatch("weight_decay", wanted, value))
    return number


def _pull_limit(value: object) -> float | None:
    if value is None:
        return None
    wanted = "a positive number, or null for no limit"
    number = _number("max_pull", value, wanted)
    if number <= 0:
        raise ConfigError(_mismatch("max_pull", wanted, value))
    return number


def _fingerprint(value: object, source: object) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-fA-F]{32}", value):
        # A number made of digits alone, or with one e, is no string to YAML.
        wanted = "32 hexadecimal digits in quotes, as sharded-spd anchor info prints them"
        raise ConfigError(_mismatch("fingerprint", wanted, value))
    if source == "zero":
        raise ConfigError("fingerprint: source zero has no values to compare; leave it out")
    return value.lower()


def _options(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(_mismatch(name, "a mapping of the rule's options", value))
    for key in value:
        if not isinstance(key, str):
            raise ConfigError(f"{name}.{key}: keys are strings, got {_shown(key)}")
    return dict(value)


def _anchor(value: object) -> AnchorConfig:
    if isinstance(value, AnchorConfig):
        return value
    if isinstance(value, (str, os.PathLike, AnchorStore)):
        return AnchorConfig(source=value)  # type: ignore[arg-type]  # a PathLike becomes its string there
    raise ConfigError(_mismatch("anchor", "a source or a mapping with source, dtype, device", value))
