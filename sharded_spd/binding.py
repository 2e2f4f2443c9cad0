"""Binding: which rule and which anchor each layer has, and this rank's shard of every anchor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from sharded_spd.agree import agree
from sharded_spd.anchors.base import AnchorStore
from sharded_spd.anchors.files import FileAnchor
from sharded_spd.anchors.fingerprint import SEEDS, combine, slice_fingerprint
from sharded_spd.errors import AnchorError
from sharded_spd.layout import BoundShard, Box, ShardLayout, ShardSlice
from sharded_spd.rules import Rule
from sharded_spd.stats import CHUNK, all_reduce_, fixed_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSettings:
    """One layer's rule and anchor.

    `weight_decay` and `max_pull` None: read from the live param group. `anchor_dtype` is for snapshots (None:
    the weight's own); `anchor_on_cpu` keeps the anchor in host memory, pinned where there is a GPU.
    """

    rule: Rule
    anchor: AnchorStore | Literal["snapshot"]
    weight_decay: float | None = None
    max_pull: float | None = None
    anchor_dtype: torch.dtype | None = None
    anchor_on_cpu: bool = False


Resolver = Callable[[ShardLayout, Mapping[str, Mapping[str, Any]], bool], Mapping[str, LayerSettings]]
"""(layout, each layer's param group, whether FQNs are real) -> each layer's options."""


@dataclass(slots=True)
class HeldAnchor:
    """This rank's shard of one anchor; `values` None stands for zero.

    `pending`: not held yet, for the layer is frozen at its anchor; its weight will be taken, in `dtype`.
    """

    piece: ShardSlice
    values: Tensor | None
    pending: bool = False
    dtype: torch.dtype | None = None


@dataclass(slots=True)
class Binding:
    """All layers' options and anchors; norms |w0| and fingerprints are whole, the same on all ranks.

    `fresh` are the layers whose anchor is, bit for bit, a snapshot that this binding took.
    """

    layout: ShardLayout
    options: Mapping[str, LayerSettings]
    held: dict[str, HeldAnchor]
    fresh: set[str] = field(default_factory=set)
    norms: dict[str, float] = field(default_factory=dict)
    fingerprints: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of all anchors."""
        return combine(self.fingerprints)

    def anchor(self, piece: ShardSlice, weight: Tensor) -> Tensor | None:
        """The bound values of `piece`; a frozen layer's are taken now, at its first gradient."""
        held = self.held[piece.layer]
        if held.pending:
            held.values = _place(weight.to(held.dtype, copy=True), weight, self.options[piece.layer])
            held.pending = False
        return held.values


def flat(tensor: Tensor) -> Tensor:
    """1-D view, or a copy where the memory is not laid out that way (channels_last)."""
    return tensor.detach().reshape(-1)


def fetch(options: LayerSettings, piece: ShardSlice, weight: Tensor) -> Tensor | None:
    """The anchor values of one slice, from the store, or from `weight` (1-D, the slice's) for a snapshot."""
    if isinstance(options.anchor, str):
        values = weight.to(options.anchor_dtype or weight.dtype, copy=True)
    else:
        fetched = options.anchor.fetch(piece)
        if fetched is None:
            return None
        if fetched.numel() != piece.numel:
            raise AnchorError(f"anchor {options.anchor.source} gave {fetched.numel()} elements for {piece}")
        values = fetched
    return _place(values, weight, options)


def _place(values: Tensor, weight: Tensor, options: LayerSettings) -> Tensor:
    if not options.anchor_on_cpu:
        return values.to(weight.device)
    return values.cpu().pin_memory() if weight.is_cuda else values.cpu()


def _cut(held: HeldAnchor, piece: ShardSlice, shape: tuple[int, ...]) -> Tensor | None:
    """The part `piece` of an anchor that was bound to another shard of its layer: before sharding."""
    if held.values is None:
        return None
    whole = 1
    for size in shape:
        whole *= size
    if held.values.numel() != whole:
        raise AnchorError(
            f"layer {piece.layer!r} was sharded anew after its anchor had been taken from another shard "
            f"({held.piece.region}, now {piece.region}); build the optimizer with anchor='deferred' and "
            "call bind() after sharding, or anchor at a checkpoint's path"
        )
    values = held.values.view(shape)
    if isinstance(piece.region, Box):
        values = values[
            tuple(slice(o, o + n) for o, n in zip(piece.region.offsets, piece.region.sizes, strict=True))
        ]
        return values.reshape(-1).clone()
    return values.reshape(-1)[piece.region.start : piece.region.start + piece.numel].clone()


def _check_stores(layout: ShardLayout, options: Mapping[str, LayerSettings]) -> None:
    by_store: dict[int, tuple[AnchorStore, dict[str, tuple[int, ...]]]] = {}
    for fqn, layer in options.items():
        if layer.rule.spec.anchored and not isinstance(layer.anchor, str):
            by_store.setdefault(id(layer.anchor), (layer.anchor, {}))[1][fqn] = layout.shapes[fqn]
    problems = []
    for store, shapes in by_store.values():
        problems += [f"{store.source}: {problem}" for problem in store.problems(shapes)]
        if not problems and isinstance(store, FileAnchor):
            problems += store.strays(layout.model_fqns)
    if problems:
        listing = "\n  ".join(problems)
        raise AnchorError(
            f"the anchor does not fit the model in {len(problems)} place(s); wanted a tensor of the layer's "
            "shape for each projected layer (a new layer: anchor 'zero' or rule 'decay' by pattern):\n  "
            f"{listing}"
        )


def bind(
    shards: Sequence[BoundShard],
    layout: ShardLayout,
    options: Mapping[str, LayerSettings],
    previous: Mapping[str, HeldAnchor],
    groups: Sequence[Any],
) -> Binding:
    """Bind every layer; one that is bound already keeps its anchor. Collective over `groups` and the scopes.

    Raises:
        AnchorError: on all ranks alike, where an anchor does not fit or cannot be read on one of them.
    """
    pieces = {p.layer: (shard, p) for shard in shards for p in shard.slices}
    result = Binding(layout, options, {})
    totals: dict[str, tuple[Tensor, Tensor]] = {}

    def local() -> None:
        _check_stores(layout, options)
        for fqn, (shard, piece) in pieces.items():
            if not options[fqn].rule.spec.anchored:
                continue
            weight = flat(shard.tensor)[piece.offset : piece.offset + piece.numel]
            shape = layout.shapes[fqn]
            values, known = _values(previous.get(fqn), options[fqn], piece, weight, shape)
            totals[fqn] = (_norm_sq(values), slice_fingerprint(values, piece, shape))
            result.held[fqn] = _hold(values, piece, weight, frozen=not shard.requires_grad)
            exact = options[fqn].anchor_dtype in (None, weight.dtype)
            if options[fqn].anchor == "snapshot" and not known and exact:
                result.fresh.add(fqn)

    agree(local, groups)
    _reduce(result, totals)
    return result


def _values(
    old: HeldAnchor | None,
    options: LayerSettings,
    piece: ShardSlice,
    weight: Tensor,
    shape: tuple[int, ...],
) -> tuple[Tensor | None, bool]:
    """The anchor of a slice, and whether it was known before this binding."""
    if old is not None and not old.pending:
        if (old.piece.region, old.piece.numel) == (piece.region, piece.numel):
            return old.values, True
        if options.anchor == "snapshot":
            return _cut(old, piece, shape), True
    return fetch(options, piece, weight), False


def _hold(values: Tensor | None, piece: ShardSlice, weight: Tensor, *, frozen: bool) -> HeldAnchor:
    """A frozen layer whose anchor its weight reproduces takes no memory before its first gradient.

    Taking it from the weight then, and not from its store, also keeps a step free of reads that may fail on
    one rank.
    """
    if frozen and values is not None and torch.equal(weight.to(values.dtype), values.to(weight.device)):
        return HeldAnchor(piece, None, pending=True, dtype=values.dtype)
    return HeldAnchor(piece, values)


def _norm_sq(values: Tensor | None) -> Tensor:
    if values is None:
        return torch.zeros((), dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    for begin in range(0, values.numel(), CHUNK):
        part = values[begin : begin + CHUNK].double()
        total += fixed_sum(part * part)
    return total


def _reduce(binding: Binding, totals: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    fqns = [fqn for fqn in binding.layout.fqns if fqn in totals]
    column = {fqn: i for i, fqn in enumerate(fqns)}
    norms = torch.zeros(len(fqns), dtype=torch.float64)
    prints = torch.zeros(len(fqns), len(SEEDS), dtype=torch.int64)
    for fqn, i in column.items():
        norms[i], prints[i] = totals[fqn]
    for scope in binding.layout.scopes:
        columns = [column[fqn] for fqn in scope.layers if fqn in column]
        for whole in (norms, prints):
            part = whole[columns]
            all_reduce_(part, scope.group)
            whole[columns] = part
    binding.norms = dict(zip(fqns, norms.sqrt().tolist(), strict=True))
    binding.fingerprints = {fqn: tuple(row) for fqn, row in zip(fqns, prints.tolist(), strict=True)}
