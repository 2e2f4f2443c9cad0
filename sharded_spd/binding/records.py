"""What is known of a binding: each layer's rule and anchor, and this rank's shard of every anchor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from sharded_spd.anchors.base import AnchorStore, DiskValues, NamedStore, Values, is_on_disk
from sharded_spd.anchors.fingerprint import combine, slice_fingerprint
from sharded_spd.anchors.memory import take_region
from sharded_spd.errors import AnchorError
from sharded_spd.rules.base import Rule
from sharded_spd.sharding.layout import ShardLayout, ShardSlice


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSettings:
    """One layer's rule and anchor.

    `weight_decay` and `max_pull` None: read from the live param group. `anchor_dtype` is for snapshots (None:
    the weight's own); `anchor_on_cpu` keeps the anchor in host memory, pinned where there is a GPU.
    `fingerprint` is the one that all layers with this anchor and this setting ought to have together.
    """

    rule: Rule
    anchor: AnchorStore | Literal["snapshot"]
    weight_decay: float | None = None
    max_pull: float | None = None
    anchor_dtype: torch.dtype | None = None
    anchor_on_cpu: bool = False
    fingerprint: str | None = None


Resolver = Callable[[ShardLayout, Mapping[str, Mapping[str, Any]], bool], Mapping[str, LayerSettings]]
"""(layout, each layer's param group, whether FQNs are real) -> each layer's options."""


@dataclass(slots=True)
class HeldAnchor:
    """This rank's shard of one anchor; `values` None stands for zero.

    `pending`: not held yet, for the layer is at its anchor and either frozen or without a strength; its
    weight will be taken, in `dtype`, if it still has this `fingerprint` (and squared norm).
    """

    piece: ShardSlice
    values: Values | None
    pending: bool = False
    dtype: torch.dtype | None = None
    fingerprint: tuple[int, ...] = ()
    norm_sq: float = 0.0


def has_strength(settings: LayerSettings, group: Mapping[str, Any]) -> bool:
    """Whether a layer may be pulled now, as far as the host can tell: lambda is not the number 0."""
    strength = group.get("weight_decay") if settings.weight_decay is None else settings.weight_decay
    return settings.rule.spec.decays or isinstance(strength, Tensor) or strength != 0


def rests(settings: LayerSettings, group: Mapping[str, Any]) -> bool:
    """Whether nothing is asked of a layer's anchor now: without a strength, and no state to be kept."""
    spec = settings.rule.spec
    return spec.anchored and not (spec.layer_state or spec.shard_state or has_strength(settings, group))


@dataclass(slots=True)
class Findings:
    """What the layers that were bound for the first time showed, the same on all ranks but for `worst`.

    `stored`: their fingerprints before a change of dtype. `differs_from_weights`: those that a checkpoint
    anchors elsewhere than at their weights. `lossy`: those whose values a change of dtype changed, on this
    rank by `worst` at most. `pinned`: the layers' fingerprints, also of other ranks', by anchor and the
    fingerprint it ought to have. `strays`: by the anchor's path, the tensors there that go on where the model
    ends. `notes`: what is to be said once.
    """

    stored: dict[str, tuple[int, ...]] = field(default_factory=dict)
    differs_from_weights: list[str] = field(default_factory=list)
    lossy: list[str] = field(default_factory=list)
    worst: float = 0.0
    pinned: dict[tuple[str, str], dict[str, tuple[int, ...]]] = field(default_factory=dict)
    strays: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Unverified:
    """Layers still to be checked, the same on all ranks: fresh snapshots, and those not held yet.

    Those are frozen, or `resting`: without a strength when they were bound. `stepped` are the fresh ones that
    have had a gradient since. `foreign`: whether state that the base optimizer has from elsewhere says that
    the weights had been trained before they were bound.
    """

    fresh: set[str] = field(default_factory=set)
    pending: set[str] = field(default_factory=set)
    resting: set[str] = field(default_factory=set)
    stepped: set[str] = field(default_factory=set)
    foreign: bool = False

    def among(self, fqns: Iterable[str]) -> set[str]:
        """Those of `fqns` that are still to be checked."""
        return {fqn for fqn in fqns if fqn in self.fresh or fqn in self.pending}


@dataclass(slots=True)
class Binding:
    """All layers' options and anchors; norms |w0| and fingerprints are whole, the same on all ranks.

    `plain`: the kinds of device on which the ranks have different kernels, so that all take plain torch.
    """

    layout: ShardLayout
    options: Mapping[str, LayerSettings]
    held: dict[str, HeldAnchor]
    unverified: Unverified = field(default_factory=Unverified)
    norms: dict[str, float] = field(default_factory=dict)
    fingerprints: dict[str, tuple[int, ...]] = field(default_factory=dict)
    elsewhere: dict[str, tuple[int, ...]] = field(default_factory=dict)
    found: Findings = field(default_factory=Findings)
    plain: frozenset[str] = frozenset()

    @property
    def fingerprint(self) -> str:
        """The fingerprint of all anchors, also of layers that only other ranks have."""
        return combine({**self.elsewhere, **self.fingerprints})

    @property
    def on_disk(self) -> set[str]:
        """The layers whose anchor is read from disk in every step; the same on all ranks that have them."""
        anchored = {fqn: own for fqn, own in self.options.items() if own.rule.spec.anchored}
        return {fqn for fqn, own in anchored.items() if is_on_disk(own.anchor)}

    @property
    def names(self) -> dict[str, str | None]:
        """The tensor of its file that each layer is anchored at; None: the file lacks it."""
        files = {fqn: own.anchor for fqn, own in self.options.items() if own.rule.spec.anchored}
        return {fqn: a.names.get(fqn) for fqn, a in files.items() if isinstance(a, NamedStore)}

    def check_files(self) -> None:
        """Raises AnchorError where the file of an anchor on disk has changed since it was bound."""
        for fqn, held in self.held.items():
            changed = lost(held.values)
            if changed is not None:
                raise AnchorError(f"layer {fqn!r}: {changed}")

    def take(self, piece: ShardSlice, weight: Tensor) -> tuple[Values | None, bool]:
        """The bound values of `piece`, and whether they are lost: its weights have changed since.

        A pending anchor is taken now, when it is first asked for, from the weight; where that has changed
        since, from its store.
        """
        held = self.held[piece.layer]
        if held.pending:
            settings, moved = self.options[piece.layer], not self.in_place(held, weight)
            held.values = place(weight.to(held.dtype, copy=True), weight, settings)
            held.pending = False
            if moved and not isinstance(settings.anchor, str):
                with suppress(AnchorError):  # all ranks raise once the sums are reduced
                    fetched, moved = fetch(settings, piece, weight), False
                    held.values = None if fetched is None else place(fetched, weight, settings)
            return held.values, moved
        return held.values, False

    def in_place(self, held: HeldAnchor, weight: Tensor) -> bool:
        """Whether a pending layer's weight is still its anchor."""
        shape = self.layout.shapes[held.piece.layer]
        prints = slice_fingerprint(weight.to(held.dtype), held.piece, shape)
        return tuple(prints.tolist()) == held.fingerprint


def flat(tensor: Tensor) -> Tensor:
    """1-D view, or a copy where the memory is not laid out that way (channels_last)."""
    return tensor.detach().reshape(-1)


def lost(values: Values | None) -> str | None:
    """Why values on disk can be read no more, if so: reading them might even end the process."""
    return values.changed() if isinstance(values, DiskValues) else None


def fetch(options: LayerSettings, piece: ShardSlice, weight: Tensor) -> Values | None:
    """The anchor values of one slice, from the store, or from `weight` (1-D, the slice's) for a snapshot."""
    if isinstance(options.anchor, str):
        values: Values = weight.to(options.anchor_dtype or weight.dtype, copy=True)
    else:
        store = options.anchor
        fetched = store.fetch(piece, weight) if isinstance(store, NamedStore) else store.fetch(piece)
        if fetched is None:
            return None
        if fetched.numel() != piece.numel:
            raise AnchorError(f"anchor {options.anchor.source} gave {fetched.numel()} elements for {piece}")
        values = fetched
    return values


def place(values: Values, weight: Tensor, options: LayerSettings) -> Values:
    """The values where their layer wants them: beside the weight, or in host memory; on disk they stay."""
    if isinstance(values, DiskValues):
        values.check()
    if not isinstance(values, Tensor):
        return values
    if not options.anchor_on_cpu:
        return values.to(weight.device)
    return values.cpu().pin_memory() if weight.is_cuda else values.cpu()


def cut(values: Values, old: ShardSlice, piece: ShardSlice, shape: tuple[int, ...]) -> Values:
    """What `piece` holds of values that were bound to another shard of the layer, e.g. the whole.

    Raises:
        AnchorError: where the other shard was not the whole layer.
    """
    if (old.region, old.numel) == (piece.region, piece.numel):
        return values
    if values.numel() != prod(shape):
        raise AnchorError(
            f"layer {piece.layer!r} was sharded anew after it had been bound to another shard "
            f"({old.region}, now {piece.region}); build the optimizer with anchor='deferred' and call "
            "bind() after sharding, or anchor at a checkpoint's path"
        )
    return take_region(values[: values.numel()].view(shape), piece)


def same_piece(old: HeldAnchor, piece: ShardSlice) -> bool:
    """Whether `old` was bound to just the elements of `piece`."""
    return (old.piece.region, old.piece.numel) == (piece.region, piece.numel)
