"""Checks of a binding: before it, when it is made, and at the first step that moves a layer.

Before it, a step must move nothing. When it is made, the anchors must be those that manifests, the
configuration and earlier bindings name. This is checked on reduced numbers, in an action that the ranks agree
on, since a manifest may lie on one node only. At a layer's first real step its reduced statistics verify the
anchor: a snapshot is of the pre-trained weights only if none were loaded after it was taken, and a frozen
layer is at its anchor only if it has not been loaded since.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from sharded_spd.anchors.base import VouchedStore, is_on_disk
from sharded_spd.anchors.fingerprint import combine, in_words
from sharded_spd.anchors.manifest import other_values
from sharded_spd.anchors.paths import some
from sharded_spd.binding.records import Binding, LayerSettings, Unverified, flat
from sharded_spd.engines.dtensor import local_tensor
from sharded_spd.errors import AnchorError, BindingError, another_anchor
from sharded_spd.rules.statistics import Statistic
from sharded_spd.sharding.collectives import agree
from sharded_spd.sharding.layout import BoundShard

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def check_unbound(optimizer: Optimizer, groups: Sequence[ProcessGroup]) -> None:
    """Let an unbound step pass as the plain base if it moves nothing for lack of gradients.

    Collective over `groups`.

    Raises:
        BindingError: any rank has a gradient that is not 0.
    """

    def check() -> None:
        for group in optimizer.param_groups:
            for grad in (p.grad for p in group["params"]):
                if grad is None:
                    continue
                local = getattr(grad, "_local_tensor", grad)
                if local.layout != torch.strided or bool(flat(local).any()):
                    raise BindingError(
                        f"{type(optimizer).__name__} was stepped with gradients before its anchors were "
                        "bound: this would be the plain base optimizer; call bind() after sharding and "
                        "loading the pre-trained weights"
                    )

    agree(check, groups)


def facts(
    options: Mapping[str, LayerSettings], shards: Sequence[BoundShard], per_step: bool
) -> dict[str, dict[str, object]]:
    """What must be the same of a layer on all ranks that sum it; a path may differ between nodes."""
    by_layer: dict[str, dict[str, object]] = {}
    for shard in shards:
        group = shard.param_group
        scalars = {key: group.get(key) for key in ("lr", "weight_decay", "max_pull", "maximize")}
        for piece in shard.slices:
            layer = options[piece.layer]
            kind = layer.anchor if isinstance(layer.anchor, str) else type(layer.anchor).__name__
            by_layer[piece.layer] = {
                "rule": f"{layer.rule.name} {_ADDRESS.sub('', repr(layer.rule))}",
                "anchor": kind if layer.rule.spec.anchored else None,
                **{k: v if isinstance(v, (int, float, bool)) else None for k, v in scalars.items()},
                "weight_decay of the configuration": layer.weight_decay,
                "max_pull of the configuration": layer.max_pull,
                "anchor on disk": is_on_disk(layer.anchor),
                "anchor.fingerprint": layer.fingerprint,
                "reduction": "per_step" if per_step else "per_inner_step",
            }
    return by_layer


def check_stored(binding: Binding) -> None:
    """Compare the values read with the manifests, layer by layer.

    Raises:
        AnchorError: they differ; it names the layers.
    """
    different: dict[str, list[str]] = {}
    for fqn, stored in binding.found.stored.items():
        store = binding.options[fqn].anchor
        if isinstance(store, VouchedStore) and store.expected(fqn) not in (None, stored):
            different.setdefault(store.source, []).append(fqn)
    if different:
        faults = [
            other_values(f"{source} ({len(fqns)} layer(s): {some(fqns, 8)})", "the manifest there")
            for source, fqns in different.items()
        ]
        raise AnchorError(
            f"{'; '.join(faults)}; fetch the files again (sharded-spd anchor verify reads them all)"
        )


def check_strays(binding: Binding) -> None:
    """Refuse files with more layers than the model, unless it starts at their values: it was cut from one.

    Raises:
        AnchorError: they are probably a larger model's.
    """
    strays, differing = binding.found.strays, set(binding.found.differs_from_weights)
    for source, names in strays.items():
        fqns = [fqn for fqn, o in binding.options.items() if getattr(o.anchor, "source", "") == source]
        if not differing.intersection(fqns):
            binding.found.notes.append(
                f"{source}: holds {len(names)} tensors of layers that the model lacks ({some(names, 3)}); "
                "it begins at the values of the others there, so it was cut from a larger one"
            )
            continue
        raise AnchorError(
            f"{source}: holds {len(names)} tensors that the model lacks although it has their like "
            f"({some(names)}), and other values in those that both have, so it is probably a larger model's"
        )


def check_pinned(binding: Binding) -> None:
    """Compare the fingerprints in the configuration with those of their layers.

    With a manifest, a fingerprint may also be that of all stored tensors, of which the model may use a part.

    Raises:
        AnchorError: they differ.
    """
    for (source, wanted), layers in binding.found.pinned.items():
        here = [fqn for fqn in layers if fqn in binding.fingerprints]
        if not here:
            continue  # only other ranks have these layers: they have the manifest, and report
        store, fingerprint = binding.options[here[0]].anchor, combine(layers)
        overall = store.expected_overall() if isinstance(store, VouchedStore) else None
        if wanted not in (fingerprint, overall):
            manifest = f" (the manifest there says {overall} of all its tensors)" if overall else ""
            raise another_anchor(
                f"anchor {source} of {len(layers)} layer(s) ({some(list(layers), 3)})",
                "the configuration's",
                wanted=wanted,
                got=f"{fingerprint}{manifest}",
                cause="another pre-trained model or revision, or other layers",
                advice="put the right files there, or correct anchor.fingerprint",
            )


def check_unchanged(before: Binding, now: Binding, renamed: Mapping[str, str]) -> None:
    """Check that a re-bound layer keeps its anchor.

    Raises:
        AnchorError: a layer has another anchor.
    """
    for fqn, prints in before.fingerprints.items():
        name = renamed.get(fqn, fqn)
        if now.fingerprints.get(name, prints) != prints:
            raise another_anchor(
                f"layer {name!r}",
                "that of the binding before",
                wanted="".join(in_words(prints)),
                got="".join(in_words(now.fingerprints[name])),
                cause="weights of a frozen layer, or the anchor's file, have changed since",
                advice="anchor at an unchanged checkpoint's path",
            )


def check_saved(saved: str, own: str) -> None:
    """Compare the fingerprint in a training checkpoint with this run's.

    Raises:
        AnchorError: they differ.
    """
    if saved and saved != own:
        raise another_anchor(
            "this run",
            "the checkpoint's",
            wanted=saved,
            got=own,
            advice="bind the checkpoint's anchor, then load",
        )


HAS_STATE, DELTA, DOT, MOVED, TRAINED = range(5)
"""Rows of the guard: ranks where the base has state, |w - w0|^2, <g, w - w0>, ranks where a layer moved
before its anchor was held, ranks where the base's state comes from steps outside this binding."""

NUM_ROWS = 5

GUARD_STATISTICS = (
    Statistic("guard_delta_sq", lambda b: b.delta * b.delta),
    Statistic("guard_grad_dot_delta", lambda b: b.grad * b.delta),
)
"""The statistics of the rows `DELTA` and `DOT`."""


class _Signs(NamedTuple):
    """What a step shows about one layer."""

    left: bool
    """It is not at its anchor, but the base has no state for it."""
    moved: bool
    """Its weights changed since it was bound, and its anchor was not held."""
    real: bool
    """It steps, with a nonzero learning rate and no overflow."""
    stepping: bool
    """It has a gradient."""
    resumed: bool
    """It is not at its anchor, and the base has state that explains it."""
    trained: bool
    """The base has state for it from earlier steps."""


def check_first_steps(
    unverified: Unverified,
    fqns: Sequence[str],
    scopes: Sequence[Sequence[str]],
    guard: Tensor,
    *,
    has_grad: Tensor,
    found_inf: Tensor,
    lr: Tensor,
    wanted: Set[str],
) -> None:
    """Check the layers that step now and remove them from `unverified`. Waits for the device.

    `wanted` are the layers with a strength: their pending anchors are taken now. A step with lr 0 and no
    gradient, which checkpoint libraries run, proves nothing.

    Raises:
        AnchorError: a layer had left its anchor before its first step, or its anchor is of fine-tuned
            weights.
    """
    stepping = has_grad > 0
    moves = (lr != 0) | (found_inf > 0) | (guard[DOT] != 0)
    has_state, left_anchor = guard[HAS_STATE] > 0, guard[DELTA] > 0
    rows = {
        "left": stepping & ~has_state & left_anchor & moves,
        "moved": guard[MOVED] > 0,
        "real": stepping & (lr != 0) & (found_inf == 0),
        "stepping": stepping,
        "resumed": has_state & left_anchor,
        "trained": stepping & (guard[TRAINED] > 0),
    }
    columns = torch.stack(list(rows.values())).T.tolist()
    signs = {
        fqn: _Signs(**dict(zip(rows, column, strict=True))) for fqn, column in zip(fqns, columns, strict=True)
    }
    scoped = {fqn for scope in scopes for fqn in scope}
    parts = [*scopes, [fqn for fqn in fqns if fqn not in scoped]]
    left, tuned = [], []
    for part in parts:
        fresh = [fqn for fqn in part if fqn in unverified.fresh]
        # If other layers were resumed, the checkpoint only lacked this layer's state.
        if not any(signs[fqn].resumed for fqn in fresh):
            left += [fqn for fqn in fresh if signs[fqn].left]
            tuned += [fqn for fqn in fresh if signs[fqn].trained and signs[fqn].real]
    thawed = [fqn for fqn in fqns if fqn in unverified.pending and signs[fqn].moved]
    _refuse(left, tuned, thawed, unverified.resting)
    for part in parts:
        if any(signs[fqn].real for fqn in part if fqn in unverified.fresh):
            unverified.fresh -= set(part)
    taken = {fqn for fqn in fqns if signs[fqn].stepping}
    unverified.stepped |= taken & unverified.fresh
    unverified.pending -= taken & wanted
    unverified.resting -= taken & wanted


def _refuse(left: Sequence[str], tuned: Sequence[str], thawed: Sequence[str], resting: Set[str]) -> None:
    if left:
        raise AnchorError(
            f"{len(left)} layer(s) had left their anchor before the first step, e.g. {left[0]!r}: "
            "weights were loaded after the snapshot was taken; load the pre-trained weights first and "
            "then build the optimizer, or use anchor='deferred' and call bind() after loading, or "
            "anchor at a checkpoint's path; when resuming, load the projector's (or AdamSPD's) state "
            "too"
        )
    if tuned:
        raise AnchorError(
            f"the optimizer has stepped {len(tuned)} layer(s) before, e.g. {tuned[0]!r}, but they "
            "are at their snapshot to the last bit: it was taken after the training, of fine-tuned "
            "weights; attach before the resumed weights and state are loaded, or load the projector's "
            "state too, or anchor at the path of the pre-trained checkpoint (or of these weights, if "
            "they are meant)"
        )
    rested = [fqn for fqn in thawed if fqn in resting]
    if rested:
        raise AnchorError(
            f"{len(rested)} layer(s) have moved while lambda was 0, e.g. {rested[0]!r}: now that it is not "
            "0, their pre-trained weights are gone; anchor at a checkpoint's path, or give "
            "lambda as a 0-d tensor from the start, which keeps the snapshot"
        )
    if thawed:
        raise AnchorError(
            f"{len(thawed)} layer(s) were frozen at their anchor when it was bound and have other "
            f"weights at their first gradient, e.g. {thawed[0]!r}: weights were loaded in between; "
            "anchor at a checkpoint's path, or let the layers require gradients when the anchor is "
            "bound"
        )


def look_for_training_(
    guard: Tensor,
    optimizer: Optimizer,
    shards: Iterable[BoundShard],
    column: Mapping[str, int],
    unseen: Set[str],
) -> None:
    """Mark in the row `TRAINED` the `unseen` layers that the optimizer has moments for from elsewhere."""
    for shard in shards:
        state = optimizer.state.get(shard.key, {}) if shard.key is not None else {}
        moments = [
            local_tensor(m).detach().reshape(-1)
            for m in state.values()
            if isinstance(m, Tensor) and shard.key is not None and m.shape == shard.key.shape
        ]
        # Before its first gradient an optimizer fills its state with a single number.
        trained = [m.ne(m[0]).any().to(guard.device) for m in moments if m.numel()]
        for piece in shard.slices if trained else ():
            if piece.layer in unseen:
                guard[TRAINED, column[piece.layer]] = torch.stack(trained).any()
