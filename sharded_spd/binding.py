"""Binding: which rule and which anchor each layer has, and this rank's shard of every anchor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sharded_spd.agree import agree, union
from sharded_spd.anchors.base import AnchorStore, Values, is_on_disk
from sharded_spd.anchors.casting import cast_of, is_away
from sharded_spd.anchors.files import FileAnchor
from sharded_spd.anchors.fingerprint import SEEDS, combine, slice_fingerprint
from sharded_spd.anchors.mapped import MappedValues
from sharded_spd.anchors.memory import TensorAnchor, take_region
from sharded_spd.anchors.notes import about_products, kept_at_start, notes
from sharded_spd.anchors.paths import some
from sharded_spd.errors import AnchorError
from sharded_spd.guard import Found, Unverified
from sharded_spd.layout import BoundShard, ShardLayout, ShardSlice
from sharded_spd.rules import Rule
from sharded_spd.stats import CHUNK, fixed_sum, sum_over_scopes_


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
    found: Found = field(default_factory=Found)
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
        return {fqn: a.names.get(fqn) for fqn, a in files.items() if isinstance(a, FileAnchor)}

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
            held.values = _place(weight.to(held.dtype, copy=True), weight, settings)
            held.pending = False
            if moved and not isinstance(settings.anchor, str):
                with suppress(AnchorError):  # all ranks raise once the sums are reduced
                    fetched, moved = fetch(settings, piece, weight), False
                    held.values = None if fetched is None else _place(fetched, weight, settings)
            return held.values, moved
        return held.values, False

    def in_place(self, held: HeldAnchor, weight: Tensor) -> bool:
        """Whether a pending layer's weight is still its anchor."""
        shape = self.layout.shapes[held.piece.layer]
        return _numbers(slice_fingerprint(weight.to(held.dtype), held.piece, shape)) == held.fingerprint


def flat(tensor: Tensor) -> Tensor:
    """1-D view, or a copy where the memory is not laid out that way (channels_last)."""
    return tensor.detach().reshape(-1)


def lost(values: Values | None) -> str | None:
    """Why values on disk can be read no more, if so: reading them might even end the process."""
    return values.changed() if isinstance(values, MappedValues) else None


def fetch(options: LayerSettings, piece: ShardSlice, weight: Tensor) -> Values | None:
    """The anchor values of one slice, from the store, or from `weight` (1-D, the slice's) for a snapshot."""
    if isinstance(options.anchor, str):
        values: Values = weight.to(options.anchor_dtype or weight.dtype, copy=True)
    else:
        store = options.anchor
        fetched = store.fetch(piece, weight) if isinstance(store, FileAnchor) else store.fetch(piece)
        if fetched is None:
            return None
        if fetched.numel() != piece.numel:
            raise AnchorError(f"anchor {options.anchor.source} gave {fetched.numel()} elements for {piece}")
        values = fetched
    return values


def _place(values: Values, weight: Tensor, options: LayerSettings) -> Values:
    if isinstance(values, MappedValues):
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


def _check_stores(layout: ShardLayout, options: Mapping[str, LayerSettings], found: Found) -> None:
    by_store: dict[int, tuple[AnchorStore, dict[str, tuple[int, ...]]]] = {}
    for fqn, layer in options.items():
        if layer.rule.spec.anchored and not isinstance(layer.anchor, str):
            by_store.setdefault(id(layer.anchor), (layer.anchor, {}))[1][fqn] = layout.shapes[fqn]
    problems = []
    for store, shapes in by_store.values():
        if isinstance(store, FileAnchor):
            store.know(layout.facts, [*layout.fqns, *layout.elsewhere, *layout.model_fqns])
        problems += store.problems(shapes)
        if not problems and isinstance(store, FileAnchor):
            on_purpose, strays = store.strays(layout.model_fqns)
            found.strays |= {store.source: strays} if strays else {}
            if on_purpose:
                found.notes.append(
                    f"{store.source}: {len(on_purpose)} tensors of layers that the model or the "
                    f"checkpoint's configuration leaves out ({some(on_purpose, 3)}) are no anchor's"
                )
    if problems:
        listing = "\n  ".join(problems)
        raise AnchorError(
            f"the anchor does not fit the model in {len(problems)} place(s); wanted a tensor of the layer's "
            "shape for each projected layer (a new layer: anchor 'zero' or rule 'decay' by pattern; another "
            f"name in the file: names):\n  {listing}"
        )


def _settle(
    layout: ShardLayout,
    options: Mapping[str, LayerSettings],
    previous: Mapping[str, HeldAnchor],
    found: Found,
) -> Mapping[str, LayerSettings]:
    """The options as they hold: adapters that zero would damage stay at their start, which is noted."""
    anchors = {fqn: own.anchor for fqn, own in options.items() if own.rule.spec.anchored}
    at_start = kept_at_start(anchors, layout.facts)
    found.notes += notes({fqn: a for fqn, a in anchors.items() if fqn not in previous}, at_start)
    return {**options, **{fqn: replace(options[fqn], anchor="snapshot") for fqn in at_start}}


def bind(
    shards: Sequence[BoundShard],
    layout: ShardLayout,
    options: Mapping[str, LayerSettings],
    previous: Mapping[str, HeldAnchor],
    unchecked: Set[str],
    groups: Sequence[Any],
    failure: Exception | None = None,
) -> Binding:
    """Bind every layer; one that is bound already keeps its anchor. Collective over `groups` and the scopes.

    Args:
        shards: this rank's shards of all layers.
        layout: the layout of all layers.
        options: each layer's settings.
        previous: what this rank holds already, by FQN.
        unchecked: layers among those whose snapshot has not been checked by a step yet.
        groups: the groups whose ranks bind together.
        failure: what this rank has found wrong before, to be raised on all of them.

    Raises:
        AnchorError: on all ranks alike, where an anchor does not fit or cannot be read on one of them.
    """
    pieces = {p.layer: (shard, p) for shard in shards for p in shard.slices}
    result = Binding(layout, options, {})
    totals: dict[str, _Totals] = {}

    def local() -> None:
        if failure is not None:
            raise failure
        _check_stores(layout, options, result.found)
        result.options = settled = _settle(layout, options, previous, result.found)
        refused: list[str] = []
        nonzero: dict[str, bool] = {}
        for fqn, (shard, piece) in pieces.items():
            if not settled[fqn].rule.spec.anchored:
                continue
            cut_out = slice(piece.offset, piece.offset + piece.numel)
            weight = flat(shard.tensor if shard.origin is None else shard.origin)[cut_out]
            shape, old = layout.shapes[fqn], previous.get(fqn)
            resting = rests(settled[fqn], shard.param_group) and (old is None or old.pending)
            if resting and old is not None and _same_part(old, piece):
                # Its weights may move meanwhile: what they were when they were bound is what counts.
                result.held[fqn] = replace(old, piece=piece)
                prints = torch.tensor(old.fingerprint)
                seen = torch.tensor([piece.numel > 0, fqn in unchecked, True, True, False, False])
                norm_sq = torch.tensor(old.norm_sq, dtype=torch.float64)
                totals[fqn] = _Totals(norm_sq, torch.cat([prints, prints, seen.long()]))
                result.unverified.resting.add(fqn)
                continue
            values, known = _values(old, settled[fqn], piece, weight, shape)
            if values is None and old is None and piece.numel:
                nonzero[fqn] = bool(weight.any())
                store = settled[fqn].anchor
                if isinstance(store, FileAnchor) and shard.requires_grad:
                    refused += filter(None, [store.refuse_zero(piece, weight)])
            if values is not None:
                values = _place(values, shard.tensor, settled[fqn])
            prints = slice_fingerprint(values, piece, shape).cpu()
            cast = cast_of(settled[fqn].anchor, fqn, weight, values) if old is None else None
            stored = prints if cast is None else torch.tensor(cast.fingerprint)
            lossy = cast is not None and cast.worst > 0
            result.found.worst = max(result.found.worst, 0.0 if cast is None else cast.worst)
            away = old is None and is_away(settled[fqn].anchor, weight, values)
            frozen = resting or not shard.requires_grad
            held = result.held[fqn] = _hold(values, piece, weight, prints, frozen=frozen)
            norm_sq = _norm_sq(values)
            if held.pending:
                held.norm_sq = float(norm_sq)
            if resting:
                result.unverified.resting.add(fqn)
            exact = settled[fqn].anchor_dtype in (None, weight.dtype)
            snapshot = settled[fqn].anchor == "snapshot" and exact
            # A rank that holds nothing of a layer cannot tell, and leaves it to the others.
            told = (known or not snapshot) and piece.numel > 0
            seen = torch.tensor([told, fqn in unchecked, held.pending, old is not None, away, lossy])
            totals[fqn] = _Totals(norm_sq, torch.cat([prints, stored, seen.long()]))
        if refused:
            raise AnchorError("anchor_missing: zero does not fit:\n  " + "\n  ".join(refused))
        result.found.notes += about_products(nonzero, layout.facts)

    agree(local, groups)
    _reduce(result, totals)
    # Tensors given by the user are bound now: this rank's shard is kept, theirs are let go.
    result.options = {
        fqn: replace(own, anchor="snapshot") if isinstance(own.anchor, TensorAnchor) else own
        for fqn, own in result.options.items()
    }
    return result


def _values(
    old: HeldAnchor | None,
    options: LayerSettings,
    piece: ShardSlice,
    weight: Tensor,
    shape: tuple[int, ...],
) -> tuple[Values | None, bool]:
    """The anchor of a slice, and whether it was known before this binding."""
    if old is None:
        return fetch(options, piece, weight), False
    if not old.pending:
        if old.values is None:
            return None, True
        if isinstance(options.anchor, str) or _same_part(old, piece):
            return cut(old.values, old.piece, piece, shape), True
        return fetch(options, piece, weight), True
    return fetch(options, piece, weight), True


def _same_part(old: HeldAnchor, piece: ShardSlice) -> bool:
    return (old.piece.region, old.piece.numel) == (piece.region, piece.numel)


def _hold(
    values: Values | None, piece: ShardSlice, weight: Tensor, prints: Tensor, *, frozen: bool
) -> HeldAnchor:
    """A layer that stays where it is, or is not pulled, and is at its anchor takes no memory until it must.

    Taking it from the weight then, and not from its store, also keeps a step free of reads that may fail on
    one rank. What takes no memory anyway is held.
    """
    if (
        frozen
        and isinstance(values, Tensor)
        and torch.equal(weight.to(values.dtype), values.to(weight.device))
    ):
        return HeldAnchor(piece, None, pending=True, dtype=values.dtype, fingerprint=_numbers(prints))
    return HeldAnchor(piece, values)


def _numbers(prints: Tensor) -> tuple[int, ...]:
    return tuple(prints.tolist())


class _Totals(NamedTuple):
    """This rank's part of |w0|^2, and of int64 counts.

    [fingerprints..., fingerprints as stored..., known, unchecked, pending, bound before, away, lossy]
    """

    norm_sq: Tensor
    counts: Tensor


def _norm_sq(values: Values | None) -> Tensor:
    if values is None:
        return torch.zeros((), dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    for begin in range(0, values.numel(), CHUNK):
        part = values[begin : begin + CHUNK].double()
        total += fixed_sum(part * part)
    return total


def _reduce(binding: Binding, totals: Mapping[str, _Totals]) -> None:
    """Sum over the scopes: norms, fingerprints, and what no rank may decide by itself."""
    fqns = [fqn for fqn in binding.layout.fqns if fqn in totals]
    norms = torch.zeros(len(fqns), dtype=torch.float64)
    counts = torch.zeros(len(fqns), 2 * len(SEEDS) + 6, dtype=torch.int64)
    for i, fqn in enumerate(fqns):
        norms[i], counts[i] = totals[fqn]
    for whole in (norms, counts):
        sum_over_scopes_(whole, fqns, binding.layout.scopes)
    binding.norms = dict(zip(fqns, norms.sqrt().tolist(), strict=True))
    found, num = binding.found, len(SEEDS)
    for fqn, row in zip(fqns, counts.tolist(), strict=True):
        known, unchecked, pending, before, away, lossy = row[2 * num :]
        binding.fingerprints[fqn] = tuple(row[:num])
        if not before:
            found.stored[fqn] = tuple(row[num : 2 * num])
        found.away += [fqn] if away else []
        found.lossy += [fqn] if lossy else []
        if pending:
            binding.unverified.pending.add(fqn)
        elif unchecked or not known:
            binding.unverified.fresh.add(fqn)
    # With each fingerprint goes whose it is, for of the layers of other ranks nothing else is known here.
    theirs = {}
    for fqn in fqns:
        own = binding.options[fqn]
        source = own.anchor if isinstance(own.anchor, str) else own.anchor.source
        theirs[fqn] = (binding.fingerprints[fqn], source, own.fingerprint)
    for fqn, (prints, source, wanted) in union(theirs, binding.layout.everywhere).items():
        binding.elsewhere[fqn] = prints
        if wanted is not None:
            found.pinned.setdefault((source, wanted), {})[fqn] = prints
