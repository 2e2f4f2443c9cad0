"""Binding: every layer gets its rule and its anchor, and all ranks learn the same result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from sharded_spd.anchors.base import AnchorStore, NamedStore, Values
from sharded_spd.anchors.casting import cast_of, is_away
from sharded_spd.anchors.fingerprint import SEEDS, slice_fingerprint
from sharded_spd.anchors.memory import TensorAnchor
from sharded_spd.anchors.notes import about_products, kept_at_start, notes
from sharded_spd.anchors.paths import some
from sharded_spd.binding.records import (
    Binding,
    Findings,
    HeldAnchor,
    LayerSettings,
    cut,
    fetch,
    flat,
    place,
    rests,
    same_piece,
)
from sharded_spd.errors import AnchorError
from sharded_spd.rules.statistics import CHUNK, fixed_sum
from sharded_spd.sharding.collectives import agree, union
from sharded_spd.sharding.layout import BoundShard, ShardLayout, ShardSlice
from sharded_spd.sharding.reductions import sum_over_scopes_


def _check_stores(layout: ShardLayout, options: Mapping[str, LayerSettings], found: Findings) -> None:
    by_store: dict[int, tuple[AnchorStore, dict[str, tuple[int, ...]]]] = {}
    for fqn, layer in options.items():
        if layer.rule.spec.anchored and not isinstance(layer.anchor, str):
            by_store.setdefault(id(layer.anchor), (layer.anchor, {}))[1][fqn] = layout.shapes[fqn]
    problems = []
    for store, shapes in by_store.values():
        if isinstance(store, NamedStore):
            store.know(layout.facts, [*layout.fqns, *layout.elsewhere, *layout.model_fqns])
        problems += store.problems(shapes)
        if not problems and isinstance(store, NamedStore):
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
    found: Findings,
) -> Mapping[str, LayerSettings]:
    """The final options: adapters that zero would damage keep their start as anchor, and a note says so."""
    anchors = {fqn: layer.anchor for fqn, layer in options.items() if layer.rule.spec.anchored}
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
    """Bind every layer; a bound layer keeps its anchor. Collective over `groups` and the scopes.

    Args:
        shards: this rank's shards of all layers.
        layout: the layout of all layers.
        options: each layer's settings.
        previous: the anchors that this rank holds already, by FQN.
        unchecked: layers of `previous` with a snapshot that no step has checked yet.
        groups: the process groups of the ranks that bind together.
        failure: an earlier error of this rank, to be raised on all of them.

    Raises:
        AnchorError: on all ranks, if an anchor does not fit or cannot be read on one of them.
    """
    pieces = {piece.layer: (shard, piece) for shard in shards for piece in shard.slices}
    result = Binding(layout, options, {})
    local_part = _LocalPart(result, previous, unchecked)

    def local() -> None:
        if failure is not None:
            raise failure
        _check_stores(layout, options, result.found)
        result.options = _settle(layout, options, previous, result.found)
        for shard, piece in pieces.values():
            if result.options[piece.layer].rule.spec.anchored:
                local_part.bind(shard, piece)
        local_part.check_zeros()

    agree(local, groups)
    _reduce(result, local_part.totals)
    # The user's tensors are bound now: keep this rank's shard, release theirs.
    result.options = {
        fqn: replace(layer, anchor="snapshot") if isinstance(layer.anchor, TensorAnchor) else layer
        for fqn, layer in result.options.items()
    }
    return result


@dataclass(slots=True)
class _LocalPart:
    """What this rank binds by itself: its slices' anchors, and its share of their sums."""

    binding: Binding
    previous: Mapping[str, HeldAnchor]
    unchecked: Set[str]
    totals: dict[str, LayerTotals] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    nonzero: dict[str, bool] = field(default_factory=dict)

    def bind(self, shard: BoundShard, piece: ShardSlice) -> None:
        """Bind one slice."""
        fqn = piece.layer
        settings, old = self.binding.options[fqn], self.previous.get(fqn)
        resting = rests(settings, shard.param_group) and (old is None or old.pending)
        if resting:
            self.binding.unverified.resting.add(fqn)
        if resting and old is not None and same_piece(old, piece):
            self._keep(old, piece)
            return
        cut_out = slice(piece.offset, piece.offset + piece.numel)
        weight = flat(shard.tensor if shard.origin is None else shard.origin)[cut_out]
        shape = self.binding.layout.shapes[fqn]
        values, known = _values(old, settings, piece, weight, shape)
        if values is None and old is None and piece.numel:
            self._note_zero(shard, piece, weight, settings.anchor)
        if values is not None:
            values = place(values, shard.tensor, settings)
        prints = tuple(slice_fingerprint(values, piece, shape).tolist())
        cast = cast_of(settings.anchor, fqn, weight, values) if old is None else None
        found = self.binding.found
        found.worst = max(found.worst, 0.0 if cast is None else cast.worst)
        frozen = resting or not shard.requires_grad
        held = self.binding.held[fqn] = _hold(values, piece, weight, prints, frozen=frozen)
        norm_sq = _norm_sq(values)
        if held.pending:
            held.norm_sq = norm_sq
        exact = settings.anchor_dtype in (None, weight.dtype)
        snapshot = settings.anchor == "snapshot" and exact
        self.totals[fqn] = LayerTotals(
            norm_sq,
            prints,
            stored=prints if cast is None else cast.fingerprint,
            # A rank that holds nothing of a layer cannot know, and leaves it to the others.
            known=(known or not snapshot) and piece.numel > 0,
            unchecked=fqn in self.unchecked,
            pending=held.pending,
            before=old is not None,
            differs_from_weights=old is None and is_away(settings.anchor, weight, values),
            lossy=cast is not None and cast.worst > 0,
        )

    def _keep(self, old: HeldAnchor, piece: ShardSlice) -> None:
        """Keep the old anchor: the weights may have moved, and their values at binding count."""
        self.binding.held[piece.layer] = replace(old, piece=piece)
        self.totals[piece.layer] = LayerTotals(
            old.norm_sq,
            old.fingerprint,
            stored=old.fingerprint,
            known=piece.numel > 0,
            unchecked=piece.layer in self.unchecked,
            pending=True,
            before=True,
        )

    def _note_zero(self, shard: BoundShard, piece: ShardSlice, weight: Tensor, store: object) -> None:
        """Note whether a layer newly anchored at zero is at zero, and whether its store refuses that."""
        self.nonzero[piece.layer] = bool(weight.any())
        if isinstance(store, NamedStore) and shard.requires_grad:
            self.refused += filter(None, [store.refuse_zero(piece, weight)])

    def check_zeros(self) -> None:
        """Raise AnchorError if zero would damage a layer; note which products of layers it stops."""
        if self.refused:
            raise AnchorError("anchor_missing: zero does not fit:\n  " + "\n  ".join(self.refused))
        self.binding.found.notes += about_products(self.nonzero, self.binding.layout.facts)


def _values(
    old: HeldAnchor | None,
    options: LayerSettings,
    piece: ShardSlice,
    weight: Tensor,
    shape: tuple[int, ...],
) -> tuple[Values | None, bool]:
    """A slice's anchor, and whether it was known before this binding."""
    if old is None:
        return fetch(options, piece, weight), False
    if not old.pending:
        if old.values is None:
            return None, True
        if isinstance(options.anchor, str) or same_piece(old, piece):
            return cut(old.values, old.piece, piece, shape), True
        return fetch(options, piece, weight), True
    return fetch(options, piece, weight), True


def _hold(
    values: Values | None, piece: ShardSlice, weight: Tensor, prints: tuple[int, ...], *, frozen: bool
) -> HeldAnchor:
    """Hold an anchor; a frozen or unpulled layer that is at its anchor takes no memory until it must.

    It is then taken from the weight, not from its store: a read in a step could fail on one rank. Anchors
    that take no memory anyway are held.
    """
    if (
        frozen
        and isinstance(values, Tensor)
        and torch.equal(weight.to(values.dtype), values.to(weight.device))
    ):
        return HeldAnchor(piece, None, pending=True, dtype=values.dtype, fingerprint=prints)
    return HeldAnchor(piece, values)


@dataclass(frozen=True, slots=True)
class LayerTotals:
    """A layer's numbers, of this rank's share or summed over ranks; a summed flag is that of any rank.

    `norm_sq`: |w0|^2. `prints`: the fingerprint; `stored`: that before a change of dtype. `known`: whether
    the anchor was known before this binding, or cannot be a snapshot of other weights. `unchecked`: whether
    no step has checked it yet. `pending`: whether it is not held. `before`: whether it was bound before.
    `differs_from_weights`: whether a checkpoint's anchor differs from its weight. `lossy`: whether a change
    of dtype changed its values.
    """

    norm_sq: float
    prints: tuple[int, ...]
    stored: tuple[int, ...]
    known: bool = False
    unchecked: bool = False
    pending: bool = False
    before: bool = False
    differs_from_weights: bool = False
    lossy: bool = False

    @staticmethod
    def summed(totals: Mapping[str, LayerTotals], layout: ShardLayout) -> dict[str, LayerTotals]:
        """The sums over all ranks, in the model's order. Collective over the scopes."""
        fqns = [fqn for fqn in layout.fqns if fqn in totals]
        norms = torch.tensor([totals[fqn].norm_sq for fqn in fqns], dtype=torch.float64)
        width = 2 * len(SEEDS) + len(_FLAGS)
        counts = torch.tensor([totals[fqn]._counts() for fqn in fqns], dtype=torch.int64).view(-1, width)
        for table in (norms, counts):
            sum_over_scopes_(table, fqns, layout.scopes)
        rows = zip(fqns, norms.tolist(), counts.tolist(), strict=True)
        return {fqn: LayerTotals._of(norm_sq, row) for fqn, norm_sq, row in rows}

    def _counts(self) -> list[int]:
        return [*self.prints, *self.stored, *(getattr(self, name) for name in _FLAGS)]

    @staticmethod
    def _of(norm_sq: float, counts: Sequence[int]) -> LayerTotals:
        num = len(SEEDS)
        flags = {name: count > 0 for name, count in zip(_FLAGS, counts[2 * num :], strict=True)}
        return LayerTotals(norm_sq, tuple(counts[:num]), tuple(counts[num : 2 * num]), **flags)


_FLAGS = tuple(f.name for f in fields(LayerTotals) if f.default is False)


def _norm_sq(values: Values | None) -> float:
    if values is None:
        return 0.0
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    for begin in range(0, values.numel(), CHUNK):
        chunk = values[begin : begin + CHUNK].double()
        total += fixed_sum(chunk * chunk)
    return float(total)


def _reduce(binding: Binding, local_totals: Mapping[str, LayerTotals]) -> None:
    """Sum over the scopes: norms, fingerprints, and what no rank may decide by itself."""
    found = binding.found
    totals = LayerTotals.summed(local_totals, binding.layout)
    for fqn, layer in totals.items():
        binding.norms[fqn] = math.sqrt(layer.norm_sq)
        binding.fingerprints[fqn] = layer.prints
        if not layer.before:
            found.stored[fqn] = layer.stored
        found.differs_from_weights += [fqn] if layer.differs_from_weights else []
        found.lossy += [fqn] if layer.lossy else []
        if layer.pending:
            binding.unverified.pending.add(fqn)
        elif layer.unchecked or not layer.known:
            binding.unverified.fresh.add(fqn)
    # Each fingerprint travels with its anchor: this rank knows nothing else of other ranks' layers.
    described = {}
    for fqn, layer in totals.items():
        settings = binding.options[fqn]
        source = settings.anchor if isinstance(settings.anchor, str) else settings.anchor.source
        described[fqn] = (layer.prints, source, settings.fingerprint)
    for fqn, (prints, source, pinned) in union(described, binding.layout.everywhere).items():
        binding.elsewhere[fqn] = prints
        if pinned is not None:
            found.pinned.setdefault((source, pinned), {})[fqn] = prints
