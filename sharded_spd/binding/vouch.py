"""Are the bound anchors what manifests, the configuration and earlier bindings say?

Told from reduced numbers, in an action on which the ranks agree: a manifest may lie on one node only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from sharded_spd.anchors.base import VouchedStore, is_on_disk
from sharded_spd.anchors.fingerprint import combine
from sharded_spd.anchors.paths import some
from sharded_spd.binding.records import Binding, LayerSettings
from sharded_spd.errors import AnchorError
from sharded_spd.sharding.layout import BoundShard

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def facts(
    options: Mapping[str, LayerSettings], shards: Sequence[BoundShard], together: bool
) -> dict[str, dict[str, object]]:
    """Of each layer, what has to be the same on all ranks that sum it; a path may be each node's own."""
    found: dict[str, dict[str, object]] = {}
    for shard in shards:
        group = shard.param_group
        scalars = {key: group.get(key) for key in ("lr", "weight_decay", "max_pull", "maximize")}
        for piece in shard.slices:
            own = options[piece.layer]
            kind = own.anchor if isinstance(own.anchor, str) else type(own.anchor).__name__
            found[piece.layer] = {
                "rule": f"{own.rule.name} {_ADDRESS.sub('', repr(own.rule))}",
                "anchor": kind if own.rule.spec.anchored else None,
                **{k: v if isinstance(v, (int, float, bool)) else None for k, v in scalars.items()},
                "weight_decay of the configuration": own.weight_decay,
                "max_pull of the configuration": own.max_pull,
                "anchor on disk": is_on_disk(own.anchor),
                "anchor.fingerprint": own.fingerprint,
                "reduction": "per_step" if together else "per_inner_step",
            }
    return found


def check_stored(binding: Binding) -> None:
    """Compare what was read with what the manifests say, layer by layer.

    Raises:
        AnchorError: where they differ; it names the layers.
    """
    different: dict[str, list[str]] = {}
    for fqn, stored in binding.found.stored.items():
        store = binding.options[fqn].anchor
        if isinstance(store, VouchedStore) and store.expected(fqn) not in (None, stored):
            different.setdefault(store.source, []).append(fqn)
    if different:
        listing = "; ".join(f"{source}: {some(fqns, 8)}" for source, fqns in different.items())
        raise AnchorError(
            f"{sum(map(len, different.values()))} layer(s) have other values than the manifest beside their "
            f"anchor's files says ({listing}): the files are damaged or were replaced; fetch them "
            "again (sharded-spd anchor verify reads them all)"
        )


def check_strays(binding: Binding) -> None:
    """Refuse files that go on where the model ends, unless it begins at their values and so was cut from one.

    Raises:
        AnchorError: where they are probably a larger model's.
    """
    strays, away = binding.found.strays, set(binding.found.away)
    for source, names in strays.items():
        own = [fqn for fqn, o in binding.options.items() if getattr(o.anchor, "source", "") == source]
        if not away.intersection(own):
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
    """Compare the fingerprints that the configuration names with those of the layers that they are for.

    One that a manifest vouches for may also be that of all that is stored, of which the model may use a part.

    Raises:
        AnchorError: where they differ.
    """
    for (source, wanted), layers in binding.found.pinned.items():
        here = [fqn for fqn in layers if fqn in binding.fingerprints]
        if not here:
            continue  # other ranks' alone: they have the manifest, and tell
        store, own = binding.options[here[0]].anchor, combine(layers)
        whole = store.expected_overall() if isinstance(store, VouchedStore) else None
        if wanted not in (own, whole):
            manifest = f"; the manifest there says {whole} of all its tensors" if whole else ""
            raise AnchorError(
                f"anchor {source}: wanted fingerprint {wanted}, got {own} of the {len(layers)} layer(s) that "
                f"it is for ({some(list(layers), 3)}){manifest}: another pre-trained model or revision, or "
                "other layers; put the right files there, or correct anchor.fingerprint"
            )


def check_unchanged(before: Binding, now: Binding, renamed: Mapping[str, str]) -> None:
    """A layer that is bound anew keeps its anchor.

    Raises:
        AnchorError: for a layer that has another.
    """
    for fqn, prints in before.fingerprints.items():
        name = renamed.get(fqn, fqn)
        if now.fingerprints.get(name, prints) != prints:
            raise AnchorError(
                f"layer {name!r} was bound to another anchor before (fingerprint {prints}, now "
                f"{now.fingerprints[name]}): weights of a frozen layer, or the anchor's file, have changed "
                "since; anchor at an unchanged checkpoint's path"
            )


def check_saved(saved: str, own: str) -> None:
    """Compare the fingerprint in a training checkpoint with this run's.

    Raises:
        AnchorError: where they differ.
    """
    if saved and saved != own:
        raise AnchorError(
            f"the checkpoint was written with anchor fingerprint {saved}, this run has {own}: another "
            "pre-trained model, or weights loaded before the anchor was taken; bind the checkpoint's anchor, "
            "then load"
        )
