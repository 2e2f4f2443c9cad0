"""AdamSPD's param groups: what it takes out of a user's group, and what it checks in its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from sharded_spd.binding.records import LayerSettings, rests
from sharded_spd.config.resolve import GroupSpec, open_source, source_name
from sharded_spd.engines.base import made_up_name
from sharded_spd.engines.param_refusals import is_left_alone
from sharded_spd.errors import AnchorError, BindingError, ConfigError, another_anchor
from sharded_spd.rules import make_rule
from sharded_spd.rules.decay import Decay
from sharded_spd.sharding.names import clean_fqns

LET_GO = "bound"
_SHARES = "(ZeroRedundancyOptimizer and OSS give each rank a part of the parameters, but the whole lists)"


def take_group(
    group: dict[str, Any], number: int, names: Mapping[Tensor, str], others: Sequence[GroupSpec]
) -> GroupSpec:
    """Take `pre`, the rule and the anchor out of `group` (modified in place), which keeps their names.

    `names` are the model's, where it is known; `others` the groups before this one.

    Raises:
        ConfigError: a rule or an anchor is unknown.
        AnchorError: `pre` has another length than `params`, and no names pair them.
        BindingError: `param_names` has another length than `params`, and there is no model.
    """
    params = group["params"]
    if not isinstance(params, set):  # torch refuses a set
        group["params"] = params = [params] if isinstance(params, Tensor) else list(params)
    listed = group.get("param_names")
    true = [names.get(p) for p in params] if all(isinstance(p, Tensor) for p in params) else []
    known = len(true) == len(params) and None not in true
    if listed is not None and len(listed) != len(params) and not known:
        raise BindingError(
            f"group {number} has {len(params)} parameters but {len(listed)} names in 'param_names' "
            f"{_SHARES}; wanted the model, which names each: functools.partial(AdamSPD, model=model)"
        )
    zero_pre = "pre" in group and group["pre"] is None
    pre = _take_pre(group)
    if pre is not None and listed is not None and known and len(listed) == len(pre):
        by_name = dict(zip(clean_fqns(list(listed)), pre, strict=True))
        missing = [name for name in true if name not in by_name]
        if missing:
            raise AnchorError(f"group {number}: layer {missing[0]!r} is not in the group's 'param_names'")
        pre = [by_name[str(name)] for name in true]
    # A rank without parameters cannot know how long the list should be.
    if pre is not None and len(pre) != len(params) and params:
        raise AnchorError(
            f"group {number} has {len(params)} parameters but {len(pre)} anchors in 'pre' {_SHARES}; wanted "
            "one anchor per parameter, in the same order, or pre=None for zero, or the names of all of them "
            "as 'param_names' and functools.partial(AdamSPD, model=model)"
        )
    check_scalars(group)
    rule, source = make_rule(group["rule"]), "zero" if zero_pre else group["anchor"]
    # Share one instance of equal rules: the projector handles all layers of an instance at once.
    rule = next((s.rule for s in others if s.rule == rule), rule)
    anchor = open_source("snapshot" if pre is not None else source)
    if pre is not None:
        tensors = [p[1] if isinstance(p, tuple) else p for p in params]
        pre = [w for w, p in zip(pre, tensors, strict=False) if not is_left_alone(p)]
    spec = GroupSpec(rule, anchor, pre)
    spec.shown = {"rule": rule.name, "anchor": "pre" if pre is not None else source_name(source)}
    group.update(spec.shown)
    return spec


def _take_pre(group: dict[str, Any]) -> list[Any] | None:
    given = group.pop("pre", None)
    if isinstance(given, str):
        raise ConfigError(
            f"got pre {given!r}, which only says that a group's anchors were given; give them again"
        )
    return None if given is None else list(given)


def check_scalars(group: Mapping[str, Any]) -> None:
    """Refuse hyper-parameters out of range; tensors are not read."""
    for key in ("lr", "eps", "weight_decay"):
        _check_range(key, group[key], 0, math.inf)
    for i, beta in enumerate(group["betas"]):
        _check_range(f"betas[{i}]", beta, 0, 1)
    if group["max_pull"] is not None and not group["max_pull"] > 0:
        raise ConfigError(f"got max_pull {group['max_pull']}; wanted a number > 0, or None for no limit")


def _check_range(key: str, value: Any, low: float, high: float) -> None:
    if not isinstance(value, Tensor) and not low <= value < high:
        raise ConfigError(f"got {key} {value}; wanted {low} <= {key} < {high}")


def group_rests(spec: GroupSpec, group: Mapping[str, Any]) -> bool:
    """Whether a group does not need its anchors; see `rests`."""
    return rests(LayerSettings(rule=spec.rule, anchor=spec.anchor), group)


def fuses_decay(spec: GroupSpec, group: Mapping[str, Any]) -> bool:
    """Whether AdamW's decay is left to torch's fused step, which rounds half precision once, not twice."""
    decays = spec.rule.spec.decays or isinstance(spec.rule, Decay)
    number = not isinstance(group["weight_decay"], Tensor)
    return bool(group["fused"]) and decays and number and group["max_pull"] is None


def check_fingerprint(saved: str, own: str, *, group: int, num_params: int) -> None:
    """Compare a group's fingerprint, "HASH/LAYERS/NAMED:HASH OF THE VALUES", with the one in a checkpoint.

    If one of the two was made without names, only the values count. A fingerprint of fewer layers than the
    group has parameters covers only one rank's share, and proves nothing.

    Raises:
        AnchorError: they differ.
    """
    theirs, mine = saved.split("/"), own.split("/")
    if theirs[0] == mine[0] or num_layers(saved, num_params) < num_params:
        return
    by_value = [parts[2].partition(":") for parts in (theirs, mine) if len(parts) > 2]
    if len(by_value) == 2 and by_value[0][0] != by_value[1][0] and by_value[0][2] == by_value[1][2]:
        return
    raise another_anchor(
        f"group {group}",
        "the checkpoint's",
        wanted=saved,
        got=own,
        advice="build the optimizer on the pre-trained weights, then load the checkpoint",
    )


def num_layers(fingerprint: str, unknown: int = 0) -> int:
    """The number of layers that a group's fingerprint covers."""
    count = fingerprint.partition("/")[2].partition("/")[0]
    return int(count) if count.isdigit() else unknown


def compare_groups(
    saved_groups: Sequence[Mapping[str, Any]],
    prints: Sequence[str],
    groups: Sequence[Mapping[str, Any]],
    specs: Sequence[GroupSpec],
) -> list[str | None]:
    """Compare the fingerprints in a checkpoint's groups with an optimizer's `prints`.

    Returns for each group the fingerprint to compare once its lambda is positive.

    Raises:
        AnchorError: they differ.
    """
    left: list[str | None] = [None] * len(specs)
    for g, (saved, own, group, spec) in enumerate(zip(saved_groups, prints, groups, specs, strict=False)):
        theirs = saved.get("anchor_fingerprint", own)
        if len(saved["params"]) != len(group["params"]):
            continue
        if group_rests(spec, saved if "rule" in saved else group):
            left[g] = theirs
        else:
            check_fingerprint(theirs, own, group=g, num_params=count_layers(group))
    return left


def under_own_names(
    state: Mapping[str, Any],
    saved_groups: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    specs: Sequence[GroupSpec],
    names: Mapping[Tensor, str],
) -> Mapping[str, Any]:
    """A projector's state under the layers' `names` here, if only one of the optimizers has true names.

    Unchanged unless the groups' anchors have the same values. The fingerprint, which includes the names and
    so cannot be compared, is left out.
    """
    own = [spec.shown.get("anchor_fingerprint", "").partition(":") for spec in specs]
    saved = [str(group.get("anchor_fingerprint", "")).partition(":") for group in saved_groups]
    if [s[2] for s in saved] != [o[2] for o in own] or saved == own:
        return state
    here: dict[str, str] = {}
    for g, (theirs, group) in enumerate(zip(saved_groups, groups, strict=True)):
        given = clean_fqns(list(theirs.get("param_names", ())))
        for i, param in enumerate(group["params"]):
            here[given[i] if i < len(given) else made_up_name(g, i)] = names.get(param, "")
    if not all(here.get(fqn) for fqn in state["layers"]):
        return state
    return {**state, "fingerprint": "", "layers": {here[fqn]: v for fqn, v in state["layers"].items()}}


def count_layers(group: Mapping[str, Any]) -> int:
    """The number of a group's parameters that are layers."""
    return sum(not is_left_alone(p) for p in group["params"])


def listed(params: Any) -> tuple[Any, Exception | None]:
    """The parameters, with iterators read once into lists, and the error of reading them."""
    if isinstance(params, (Tensor, Mapping)):
        return params, None  # torch says what is wrong
    try:
        entries = list(params)
        for i, group in enumerate(entries):
            if isinstance(group, Mapping) and isinstance(group.get("params"), Iterator):
                entries[i] = {**group, "params": list(group["params"])}
        return entries, None
    except Exception as error:
        return [], error


def tensors_in(params: Any) -> list[Tensor]:
    """The tensors among parameters, named parameters and groups, if any."""
    tensors: list[Tensor] = []
    for entry in params if isinstance(params, Sequence) else ():
        given = entry.get("params") if isinstance(entry, Mapping) else entry
        if isinstance(entry, tuple) or isinstance(given, Tensor):
            given = [entry[-1] if isinstance(entry, tuple) and entry else given]
        tensors += [
            p[-1] if isinstance(p, tuple) and p else p for p in (given if isinstance(given, Sequence) else ())
        ]
    return [p for p in tensors if isinstance(p, Tensor)]
