"""Matches layers to the tensors of a checkpoint: the user's rules, the loader's renamings, ties, spellings.

A layer has a name in the model, a name in the file, and a renaming by the loader between the two. All are
resolved here, for all layers at once, for every use of a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sharded_spd.errors import AnchorError
from sharded_spd.sharding.layout import ModelFacts
from sharded_spd.sharding.names import apply_rules, match_names, shown_rule

_PARAMETRIZED = re.compile(r"(?P<path>.*?)parametrizations\.(?P<name>[^.]+)\.(?P<part>original[01]?)")
_OLD_PARTS = {"original0": "_g", "original1": "_v", "original": "_orig"}
_OLD_PARAMETRIZED = re.compile(r"(?P<name>(?:.*[._])?(?:weight|bias))_(?P<part>g|v|orig)")
_SPELLED = {"weight": "gamma", "bias": "beta", "gamma": "weight", "beta": "bias"}


@dataclass(slots=True)
class Naming:
    """The result of `find`.

    `keys`: the tensor of each layer that has one; `otherwise`: why a layer has none although the file has
    its values.
    """

    keys: dict[str, str] = field(default_factory=dict)
    otherwise: dict[str, str] = field(default_factory=dict)


def find(
    layers: Sequence[str],
    files: Collection[str],
    facts: ModelFacts,
    rules: Mapping[str, str],
    fits: Callable[[str, str], bool],
) -> Naming:
    """Find each layer's tensor among `files`.

    In this order: the rules, the names as they are or as the loader renames them (whichever explains more
    layers; the other for the rest), the other names of tied layers, and the older spellings of torch and
    TensorFlow (`weight_g`, `gamma`) where `fits(layer, tensor)`.

    Raises:
        AnchorError: a layer could be several tensors, or several layers would be the same tensor and no rule
            says so.
    """
    renamed, made = ({}, {}) if facts.loader is None else facts.loader.rename(files)
    names = {
        n: (apply_rules(n, rules), *(apply_rules(a, rules) for a in facts.ties.get(n, ()))) for n in layers
    }
    result = Naming()

    # One by one a base model's prefix could not be told, so those that are settled go along.
    def settle(wanted: Mapping[str, str], taken: Collection[str] = ()) -> None:
        known = [names[layer][0] for layer in result.keys]
        matched = _match([*dict.fromkeys([*known, *wanted.values()])], files, renamed)
        for layer, name in wanted.items():
            if name in matched and matched[name] not in taken and layer not in result.keys:
                result.keys[layer] = matched[name]

    settle({layer: own[0] for layer, own in names.items()})
    for i in range(1, max(map(len, names.values()), default=1)):
        settle({n: own[i] for n, own in names.items() if n not in result.keys and len(own) > i})
    claimed = set(result.keys.values())
    missing = {
        n: [o for name in own for o in _spellings(name)] for n, own in names.items() if n not in result.keys
    }
    for i in range(max(map(len, missing.values()), default=0)):
        tried = {n: own[i] for n, own in missing.items() if n not in result.keys and len(own) > i}
        settle(tried, claimed)
        for layer in tried:
            if layer in result.keys and not fits(layer, result.keys[layer]):
                del result.keys[layer]
    for layer in (n for n in layers if n not in result.keys):
        why = next(filter(None, (_otherwise(name, files, made) for name in names[layer])), None)
        if why is not None:
            result.otherwise[layer] = why
    result.keys = {layer: result.keys[layer] for layer in layers if layer in result.keys}
    return result


def _match(wanted: Sequence[str], files: Collection[str], renamed: Mapping[str, str]) -> dict[str, str]:
    """By the names as they are, and by those that the loader gives the tensors."""
    ways: list[dict[str, str]] = []
    failure: AnchorError | None = None
    by_new: dict[str, list[str]] = {}
    for key, name in renamed.items():
        by_new.setdefault(name, []).append(key)
    single = {name: keys[0] for name, keys in by_new.items() if len(keys) == 1}
    for available in ({key: key for key in files}, single):
        if ways and all(name == key for name, key in single.items()):
            break
        try:
            found = match_names(wanted, available)
        except AnchorError as error:
            failure = failure or error
        else:
            ways.append({name: available[key] for name, key in found.items()})
    if failure is not None and not any(ways):
        raise failure
    ways.sort(key=len, reverse=True)
    best = dict(ways[0]) if ways else {}
    for other in ways[1:]:
        taken = set(best.values())
        best |= {name: key for name, key in other.items() if name not in best and key not in taken}
    return best


def _spellings(name: str) -> Iterator[str]:
    """What else a parameter is called: by torch's parametrizations, before and now, and by TensorFlow."""
    now = _PARAMETRIZED.fullmatch(name)
    if now is not None:
        yield f"{now['path']}{now['name']}{_OLD_PARTS[now['part']]}"
    old = _OLD_PARAMETRIZED.fullmatch(name)
    if old is not None:
        path, _, last = old["name"].rpartition(".")
        part = next(new for new, ending in _OLD_PARTS.items() if ending == f"_{old['part']}")
        yield ".".join(filter(None, (path, "parametrizations", last, part)))
        if old["part"] == "orig":  # pruning and spectral_norm keep the weight itself
            yield old["name"]
    path, _, last = name.rpartition(".")
    if last in _SPELLED:
        yield ".".join(filter(None, (path, _SPELLED[last])))


def _otherwise(name: str, files: Collection[str], made: Mapping[str, str]) -> str | None:
    """Why the file has the values of a layer but no tensor that is the layer."""
    if match_names([name], made):
        source = made[match_names([name], made)[name]]
        return f"its loader makes it of {source} and others of the file, so no tensor there is the layer"
    now, old = _PARAMETRIZED.fullmatch(name), _OLD_PARAMETRIZED.fullmatch(name)
    whole = f"{now['path']}{now['name']}" if now is not None else old["name"] if old is not None else None
    if whole is not None and whole in files:
        return f"it is a part of a parametrization of {whole}, which the file holds whole"
    return None


def suggest(layer: str, files: Collection[str]) -> str | None:
    """A rule that would find a layer under its own name with other components in front."""
    parts = layer.split(".")
    for cut in range(1, len(parts)):
        if ".".join(parts[cut:]) in files:
            front = re.escape(".".join(parts[:cut]))
            return shown_rule(rf"{front}\.(.*)", r"\1")
    fronts = {key.removesuffix(f".{layer}") for key in files if key.endswith(f".{layer}")}
    return shown_rule("(.*)", rf"{min(fronts)}.\1") if fronts else None


def exact_rule(layer: str, key: str) -> str:
    """The rule that gives one layer one tensor."""
    return shown_rule(re.escape(layer), key.replace("\\", r"\\"))
