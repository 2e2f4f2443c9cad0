"""Records of a binding: each layer's rule and anchor, and this rank's shard of every anchor."""

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
    `fingerprint` is the expected one of all layers with this anchor and this setting together.
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
    """This rank's shard of one anchor; `values` None means zero.

    `pending`: not held yet, since the layer is at its anchor and either frozen or without a strength; its
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
    """Whether a layer's anchor is not needed now: it has no strength and keeps no state."""
    spec = settings.rule.spec
    return spec.anchored and not (spec.layer_state or spec.shard_state or has_strength(settings, group))


@dataclass(slots=True)
class Findings:
    """Findings about the layers bound for the first time, the same on all ranks except `worst`.

    `stored`: their fingerprints before a change of dtype. `differs_from_weights`: layers that a checkpoint
    anchors at other values than their weights. `lossy`: layers with values that a change of dtype changed, on
    this rank by at most `worst`. `pinned`: by anchor and its expected fingerprint, the fingerprints of its
    layers, including other ranks'. `strays`: by the anchor's path, its tensors of layers beyond the model's
    last. `notes`: messages to warn about once.
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
    """Layers not checked yet, the same on all ranks: `fresh` snapshots, and `pending` ones not held yet.

    Pending layers are frozen, or `resting`: without a strength when they were bound. `stepped` are the fresh
    ones that have had a gradient since. `foreign`: whether base optimizer state from elsewhere proves that
    the weights were trained before they were bound.
    """

    fresh: set[str] = field(default_factory=set)
    pending: set[str] = field(default_factory=set)
    resting: set[str] = field(default_factory=set)
    stepped: set[str] = field(default_factory=set)
    foreign: bool = False

    def among(self, fqns: Iterable[str]) -> set[str]:
        """Those of `fqns` that are not checked yet."""
        return {fqn for fqn in fqns if fqn in self.fresh or fqn in self.pending}


@dataclass(slots=True)
class Binding:
    """All layers' options and anchors; norms |w0| and fingerprints are of full layers, alike on all ranks.

    `plain`: device types on which ranks have different kernels, so that all use plain torch.
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
        """The fingerprint of all anchors, including layers that only other ranks have."""
        return combine({**self.elsewhere, **self.fingerprints})

    @property
    def on_disk(self) -> set[str]:
        """Layers with an anchor that every step reads from disk; the same on all ranks that have them."""
        anchored = {fqn: layer for fqn, layer in self.options.items() if layer.rule.spec.anchored}
        return {fqn for fqn, layer in anchored.items() if is_on_disk(layer.anchor)}

    @property
    def names(self) -> dict[str, str | None]:
        """By layer, its anchor's tensor in the file; None: the file lacks it."""
        files = {fqn: layer.anchor for fqn, layer in self.options.items() if layer.rule.spec.anchored}
        return {fqn: a.names.get(fqn) for fqn, a in files.items() if isinstance(a, NamedStore)}

    def check_files(self) -> None:
        """Raise AnchorError if the file of an on-disk anchor has changed since it was bound."""
        for fqn, held in self.held.items():
            changed = lost(held.values)
            if changed is not None:
                raise AnchorError(f"layer {fqn!r}: {changed}")

    def take(self, piece: ShardSlice, weight: Tensor) -> tuple[Values | None, bool]:
        """The bound values of `piece`, and whether they are lost: its weights have changed since.

        A pending anchor is taken now, on first use, from the weight; if that has changed, from its store.
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
    """A 1-D view, or a copy if the memory layout does not allow one (channels_last)."""
    return tensor.detach().reshape(-1)


def lost(values: Values | None) -> str | None:
    """Why values on disk can no longer be read, if so: reading them might even kill the process."""
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
    """Move values to the weight's device, or to host memory; values on disk stay there."""
    if isinstance(values, DiskValues):
        values.check()
    if not isinstance(values, Tensor):
        return values
    if not options.anchor_on_cpu:
        return values.to(weight.device)
    return values.cpu().pin_memory() if weight.is_cuda else values.cpu()


def cut(values: Values, old: ShardSlice, piece: ShardSlice, shape: tuple[int, ...]) -> Values:
    """The values of `piece`, cut from values bound to another shard of the layer, e.g. the full layer.

    Raises:
        AnchorError: the other shard was not the full layer.
    """
    if (old.region, old.numel) == (piece.region, piece.numel):
        return values
    if values.numel() != prod(shape):
        raise AnchorError(
            f"layer {piece.layer!r} was resharded after it was bound to another shard "
            f"({old.region}, now {piece.region}); build the optimizer with anchor='deferred' and call "
            "bind() after sharding, or anchor at a checkpoint's path"
        )
    return take_region(values[: values.numel()].view(shape), piece)


def same_piece(old: HeldAnchor, piece: ShardSlice) -> bool:
    """Whether `old` was bound to exactly the elements of `piece`."""
    return (old.piece.region, old.piece.numel) == (piece.region, piece.numel)
