"""Names of layers: what wrappers add to them, and which tensor of a checkpoint a layer is."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from sharded_spd.errors import AnchorError, ConfigError

_WRAPPERS = frozenset({"_checkpoint_wrapped_module", "_fpw_module", "_fsdp_wrapped_module", "_orig_mod"})
_DDP = "module."
_PEFT = "base_model.model."
# A module that PEFT trains in full: its copy and its original both start from the checkpoint's tensor.
_PEFT_COPY = re.compile(r"\.(?:original_module|modules_to_save\.[^.]+)(?=\.)")
_PEFT_BASE = re.compile(r"\.base_layer(?=\.)")
# A model that PEFT wraps below the top, or wraps twice.
_PEFT_WITHIN = re.compile(r"(?:(?<=\.)|^)base_model\.model\.")


def check_rules(rules: object) -> dict[str, str]:
    """Check a mapping of patterns on layers' names to names in a file, as `names` in the settings.

    Raises:
        ConfigError: it is not a mapping, or one of its patterns or replacements is invalid.
    """
    if not isinstance(rules, Mapping):
        raise ConfigError(f"names: wanted a mapping of patterns to names in the file, got {rules!r:.100}")
    for pattern, replacement in rules.items():
        if not isinstance(pattern, str) or not pattern or not isinstance(replacement, str) or not replacement:
            raise ConfigError(
                f"names: wanted a regular expression on layers' names and the name in the file, got "
                f"{pattern!r:.100}: {replacement!r:.100}"
            )
        try:
            re.sub(pattern, replacement, "")
        except (re.error, IndexError) as error:
            raise ConfigError(
                f"names: {pattern!r}: {replacement!r} is not valid: {error}; wanted a regular expression "
                "that matches a whole name, and a replacement in which \\1 is its first group: "
                r'"student\.(.*)": "\1"'
            ) from None
    return dict(rules)


def apply_rules(name: str, rules: Mapping[str, str]) -> str:
    """Rename by the first pattern that matches all of `name`; unchanged if none does."""
    for pattern, replacement in rules.items():
        match = re.fullmatch(pattern, name)
        if match is not None:
            return match.expand(replacement)
    return name


def shown_rule(pattern: str, replacement: str) -> str:
    """A rule as a user writes it."""
    return f"names: {json.dumps({pattern: replacement})}"


def clean_fqn(name: str) -> str:
    """Drop the components that wrappers insert anywhere: FSDP1, fairscale, torch.compile, checkpointing.

    `module.` and PEFT's names stay, since a user's submodule may have such a name; see `match_names`.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def clean_fqns(names: Sequence[str]) -> list[str]:
    """Drop what wrappers insert, and `module.` or `base_model.model.` if all names begin with it.

    So a layer has the same name under every engine. A model's own submodule `module` loses its name only if
    it holds everything.
    """
    cleaned = [clean_fqn(name) for name in names]
    for prefix in (_DDP, _PEFT):
        while cleaned and all(name.startswith(prefix) for name in cleaned):
            cleaned = [name.removeprefix(prefix) for name in cleaned]
    return cleaned


def match_names(wanted: Sequence[str], available: Collection[str]) -> dict[str, str]:
    """Find the checkpoint's name of each wanted layer; a layer that it lacks is not in the result.

    The first match wins: the exact name; the name without wrappers; the name without the components of DDP
    and PEFT (`module.` only if every name begins with it). Layers still missing are matched with one leading
    component more or less, as between a Hugging Face model and its base model, if a single such change
    explains more layers than the unchanged names.

    Raises:
        AnchorError: a layer matches several tensors, or several layers match the same tensor.
    """
    found = {name: name for name in wanted if name in available}
    cleaned = {name: clean_fqn(name) for name in available}
    _join(found, {name: clean_fqn(name) for name in wanted}, cleaned)
    plain_wanted, plain_available = _plain(wanted), _plain(available)
    _join(found, plain_wanted, plain_available)
    missing = {name: plain for name, plain in plain_wanted.items() if name not in found}
    if missing:
        found.update(_by_base_prefix(missing, plain_wanted, found, plain_available))
    _refuse_shared(found)
    return {name: found[name] for name in wanted if name in found}


def _plain(names: Collection[str]) -> dict[str, str]:
    """Each name without the components that wrappers, DDP and PEFT insert."""
    plain = {name: clean_fqn(name) for name in names}
    while plain and all(value.startswith(_DDP) for value in plain.values()):
        plain = {name: value.removeprefix(_DDP) for name, value in plain.items()}
    return {
        name: _PEFT_BASE.sub("", _PEFT_COPY.sub("", _PEFT_WITHIN.sub("", value)))
        for name, value in plain.items()
    }


def _join(found: dict[str, str], wanted: Mapping[str, str], available: Mapping[str, str]) -> None:
    """Add to `found` (modified in place) the layers with the key of a single available tensor."""
    by_key = _grouped(available)
    for name, key in wanted.items():
        if name in found or key not in by_key:
            continue
        if len(by_key[key]) > 1:
            names = ", ".join(sorted(by_key[key]))
            raise AnchorError(
                f"{name}: could be any of {names} of the checkpoint; rename the tensors there, or say which "
                f"by {shown_rule(re.escape(name), by_key[key][0])}"
            )
        found[name] = by_key[key][0]


def _by_base_prefix(
    missing: Mapping[str, str],
    wanted: Mapping[str, str],
    found: Mapping[str, str],
    available: Mapping[str, str],
) -> dict[str, str]:
    """Match with one leading component more or less, the same for all layers concerned."""
    by_key = {key: names[0] for key, names in _grouped(available).items() if len(names) == 1}
    heads = {key.partition(".")[0] for key in by_key if "." in key}
    trials: dict[str, dict[str, str]] = defaultdict(dict)
    rules: dict[str, str] = {}
    for name, plain in missing.items():
        head, _, rest = plain.partition(".")
        if rest in by_key:
            change = f"without {head!r}"
            trials[change][name] = by_key[rest]
            rules[change] = shown_rule(rf"{re.escape(head)}\.(.*)", r"\1")
        for prefix in heads:
            if f"{prefix}.{plain}" in by_key:
                change = f"with {prefix!r} in front"
                trials[change][name] = by_key[f"{prefix}.{plain}"]
                rules[change] = shown_rule("(.*)", rf"{prefix}.\1")
    settled = {wanted[name].partition(".")[0] for name in found}
    plausible = {
        change: hits
        for change, hits in trials.items()
        if len(hits) > len(found) and settled.isdisjoint(wanted[name].partition(".")[0] for name in hits)
    }
    if len(plausible) > 1:
        example = ", ".join(f"{change}: {len(hits)} layers" for change, hits in sorted(plausible.items()))
        ways = " or ".join(rules[change] for change in sorted(plausible))
        raise AnchorError(
            f"the layers' names fit the checkpoint in more than one way ({example}); say which by {ways} (or "
            "several patterns, also to the same tensors), or rename the tensors there"
        )
    return next(iter(plausible.values()), {})


def _refuse_shared(found: Mapping[str, str]) -> None:
    """Raise if two layers match one tensor, unless PEFT made one a copy of the other."""
    for key, names in _grouped(found).items():
        if len({_PEFT_COPY.sub("", clean_fqn(name)) for name in names}) > 1:
            raise AnchorError(
                f"{', '.join(names)}: all would be {key} of the checkpoint; rename the tensors there, or, if "
                f"they began as copies of it, say so by {shown_rule(re.escape(names[-1]), key)}"
            )


def _grouped(keys: Mapping[str, str]) -> dict[str, list[str]]:
    """Group names by key."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, key in keys.items():
        groups[key].append(name)
    return dict(groups)
