"""Anchors that differ from what the user asked for: which they are, and the notes about them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

from sharded_spd.anchors.adapters import kinds, neutral_at, unsettled
from sharded_spd.anchors.base import AnchorStore
from sharded_spd.anchors.files import FileAnchor
from sharded_spd.anchors.memory import ZeroAnchor
from sharded_spd.anchors.paths import some
from sharded_spd.sharding.layout import ModelFacts

Anchors = Mapping[str, AnchorStore | Literal["snapshot"]]


def kept_at_start(anchors: Anchors, facts: ModelFacts) -> list[str]:
    """Layers to be anchored at zero, but of an adapter that is not neutral at zero."""
    return [
        fqn
        for fqn, anchor in anchors.items()
        if (isinstance(anchor, ZeroAnchor) and neutral_at(fqn, facts) == "start")
        or (isinstance(anchor, FileAnchor) and bool(anchor.at_start([fqn])))
    ]


def notes(anchors: Anchors, at_start: Collection[str]) -> list[str]:
    """The notes on `anchors`, those of layers bound for the first time."""
    own = [fqn for fqn in at_start if fqn in anchors]
    found = []
    if own:
        found.append(
            f"{len(own)} adapter layer(s) are anchored at their values at binding instead of zero "
            f"({', '.join(kinds(own)) or 'of an unknown kind'}; {some(own, 3)}): at zero they would not "
            "leave the pre-trained function alone"
        )
    stores: dict[int, tuple[FileAnchor, list[str]]] = {}
    for fqn, anchor in anchors.items():
        if isinstance(anchor, FileAnchor) and fqn not in at_start:
            stores.setdefault(id(anchor), (anchor, []))[1].append(fqn)
    for store, fqns in stores.values():
        found += store.notes(fqns)
    return found


def about_products(nonzero: Mapping[str, bool], facts: ModelFacts) -> list[str]:
    """What to say of layers at zero, of which `nonzero` tells whether they have other values now."""
    found = unsettled(nonzero, facts)
    if not found:
        return []
    return [
        f"{len(found)} pair(s) of LoRA's factors are anchored at zero and do not begin there "
        f"({some(found, 3)}): right where the base weights are the pre-trained ones (LoRA, resumed or not), "
        "wrong where they were changed to make up for the factors (PiSSA, OLoRA, CorDA, LoftQ): say anchor: "
        "snapshot there, or give the model, which tells"
    ]
