"""The local part of a plan: this rank's slices, their hyper-parameters, and the kernels' tables of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sharded_spd.anchors.base import DiskValues, Values
from sharded_spd.binding.records import Binding, lost, rests
from sharded_spd.engines.dtensor import local_tensors
from sharded_spd.kernels.base import FORMED, Backend, Moments, Slice, Table
from sharded_spd.kernels.choose import REFERENCE, choose
from sharded_spd.projection.hyperparams import Hyperparams
from sharded_spd.projection.layers import LayerTable, Phase, RuleLayers
from sharded_spd.projection.prefetch import ahead
from sharded_spd.projection.reduction import Sums
from sharded_spd.rules.base import RuleSpec
from sharded_spd.rules.rows import RowSpan, add_row_sums_, row_spans
from sharded_spd.rules.statistics import CHUNK, DELTA_SQ, Block, Statistic, layer_sums
from sharded_spd.sharding.layout import BoundShard, ShardSlice

_GONE = BoundShard(torch.empty(0), None, (), {})


class StepPlan(LayerTable):
    """All that stays the same from step to step: the table of the layers, and this rank's slices of them.

    A new binding makes new plans; `slices` are rebuilt when the optimizer holds other shards.
    """

    def __init__(self, fqns: Sequence[str], binding: Binding, device: torch.device) -> None:
        super().__init__(fqns, binding, device)
        self.binding = binding
        self.meets_always = self.early or not binding.on_disk.isdisjoint(self.fqns)
        """Whether ranks reduce even if no rule asks for a sum: a failure has no other way to the others."""
        self._slices: LocalSlices | None = None

    def slices(self, shards: Sequence[BoundShard]) -> LocalSlices:
        """This rank's slices; reused from the last step while `shards` are like those of that step."""
        if self._slices is None or not self._slices.fit(shards):
            self._slices = LocalSlices(self, shards)
        return self._slices


@dataclass(slots=True, eq=False)
class LocalSlice:
    """One slice that may step, and its place in the plan and among its rule's layers.

    `position`: the index of its shard in the step. `tensors`: the current ones; the weight is a copy if the
    shard's is not contiguous. `backend` works on them, chosen for this `kind` of tensors. `values`: the bound
    anchor's. `settled`: whether they are bound (a frozen layer's are not before its first gradient).
    `moved`: whether they turned out to be lost in this step. `kept`: the weights before the base step, if
    the rule asks for them.
    """

    position: int
    piece: ShardSlice
    layers: RuleLayers
    index: int
    column: int
    shard: BoundShard
    tensors: Slice
    spans: list[RowSpan]
    state: dict[str, Tensor]
    backend: Backend = REFERENCE
    kind: tuple[object, ...] = ()
    values: Values | None = None
    settled: bool = False
    moved: bool = False
    kept: Tensor | None = None

    def take_weight(self) -> None:
        """Take the shard's weights; a 1-D copy if they are not contiguous (channels_last)."""
        tensor = self.shard.tensor
        self.tensors.weight = tensor if tensor.is_contiguous() else tensor.detach().reshape(-1)

    def write_back(self) -> None:
        """Copy changed weights back to the shard, if they are a copy."""
        tensor = self.shard.tensor
        if not tensor.is_contiguous():
            tensor.copy_(self.tensors.weight.view(tensor.shape))

    def choose_backend(self, plain: frozenset[str]) -> None:
        """Choose the fastest backend that takes these tensors."""
        weight, grad, anchor = self.tensors.weight, self.tensors.grad, self.tensors.anchor
        kind: tuple[object, ...] = (type(weight), weight.dtype, weight.device, type(anchor), type(grad))
        if grad is not None:
            kind += (grad.dtype, grad.device)
        if kind != self.kind:
            self.backend, self.kind = choose(self.tensors, plain), kind

    def blocks(self, *, grads: bool) -> Iterator[tuple[slice, Block]]:
        """The slice's current tensors, in chunks."""
        tensors = self.tensors
        weight, grad = tensors.flat_weight(), tensors.flat_grad() if grads else None
        for begin in range(0, tensors.numel, CHUNK):
            cut = slice(begin, min(begin + CHUNK, tensors.numel))
            yield (
                cut,
                Block(
                    weight=weight[cut],
                    anchor=None if tensors.anchor is None else tensors.anchor[cut],
                    raw_grad=None if grad is None else grad[cut],
                    grad_factor=tensors.grad_factor,
                    kept=None if self.kept is None else self.kept[cut],
                    state={name: t[cut] for name, t in self.state.items()},
                ),
            )

    def add_to(self, sums: Sums, phase: Phase, wanted: Sequence[Statistic]) -> None:
        """Add this slice's share of the statistics `wanted`, in plain torch."""
        layers, per_layer = self.layers, tuple(s for s in wanted if s.per == "layer")
        per_row = [
            (s, sums.rows_of((phase, s), layers)[layers.row_ranges[self.index]])
            for s in wanted
            if s.per == "row"
        ]

        def blocks() -> Iterator[Block]:
            for cut, block in self.blocks(grads=phase == "before"):
                for stat, rows in per_row:
                    add_row_sums_(rows, stat.term(block), self.spans, cut.start)
                yield block

        for stat, value in zip(per_layer, layer_sums(blocks(), per_layer), strict=True):
            sums.add((phase, stat), self.column, value)


class LocalSlices:
    """The slices of a plan, while its shards stay the same; holds none of their tensors between steps."""

    def __init__(self, plan: StepPlan, shards: Sequence[BoundShard]) -> None:
        self._binding = plan.binding
        self._shard_keys = [(shard.slices, shard.param_group) for shard in shards]
        scopes = [scope.fqns for scope in plan.scopes]
        self.hyperparams = Hyperparams(plan.column, scopes, plan.device, plan.binding, shards)
        self.batches = KernelBatches(plan.device)
        self.lost: dict[str, str] = {}
        """The layers with an on-disk anchor that can no longer be read, and why."""
        self._all: list[LocalSlice] = []
        for position, piece in ((i, piece) for i, shard in enumerate(shards) for piece in shard.slices):
            layers, index = plan.layers_of[piece.layer]
            if piece.numel == 0 or not layers.rule.spec.pulls:
                continue
            by_row = layers.rule.spec.granularity == "row" or layers.has_row_stats
            self._all.append(
                LocalSlice(
                    position,
                    piece,
                    layers,
                    index,
                    plan.column[piece.layer],
                    shards[position],
                    Slice(_GONE.tensor, piece.offset, piece.numel, None),
                    row_spans(piece, plan.binding.layout.shapes[piece.layer]) if by_row else [],
                    plan.shard_states.get(piece.layer, {}),
                    settled=not layers.rule.spec.anchored,
                )
            )
        self.fusable = self._find_fusable()
        """The optimizer's tensors that a kernel may step with their sums, and the slices that cover each."""
        for item in self._all:
            item.shard = _GONE

    def _find_fusable(self) -> dict[Tensor, list[LocalSlice]]:
        by_owner: dict[Tensor, list[LocalSlice]] = {}
        for item in self._all:
            if item.shard.owner is not None and _needs_sums_only(item.layers.rule.spec):
                by_owner.setdefault(item.shard.owner, []).append(item)
        return {
            owner: items
            for owner, items in by_owner.items()
            if sum(item.piece.numel for item in items) == items[0].shard.tensor.numel()
        }

    def fit(self, shards: Sequence[BoundShard]) -> bool:
        """Whether these are the shards it was made from, or others just like them."""
        return len(shards) == len(self._shard_keys) and all(
            shard.slices is slices and shard.param_group is group
            for shard, (slices, group) in zip(shards, self._shard_keys, strict=True)
        )

    def gather_live(self, shards: Sequence[BoundShard], grad_scale: Tensor | None) -> list[LocalSlice]:
        """The slices that have a gradient, as they are now."""
        live = []
        factors: dict[tuple[int, torch.device], float | Tensor] = {}
        self.lost = {}
        for item in self._all:
            shard = shards[item.position]
            grad = shard.grad
            if grad is None or self._rests(item, shard):
                continue
            item.shard = shard
            item.take_weight()
            tensors = item.tensors
            tensors.grad = grad if grad.is_contiguous() else grad.detach().reshape(-1)
            kind = (id(shard.param_group), grad.device)
            if kind not in factors:
                factors[kind] = _factor(shard, grad, grad_scale)
            tensors.grad_factor = factors[kind]
            if not item.settled:
                item.values, item.moved = self._binding.take(item.piece, tensors.flat_weight())
                tensors.anchor, item.settled = item.values, True
            values = item.values
            if not (values is None or isinstance(values, Tensor)) and isinstance(values, DiskValues):
                self._look_at_file(item, values)
            live.append(item)
        if self._on_gpu(live):
            carried = ahead([(item.tensors.anchor, item.tensors.weight.device) for item in live])
            for item, anchor in zip(live, carried, strict=True):
                item.tensors.anchor = anchor
        for item in live:
            item.choose_backend(self._binding.plain)
        return live

    @staticmethod
    def _on_gpu(live: Sequence[LocalSlice]) -> bool:
        """Whether there is a stream to copy anchors in host memory on."""
        return any(item.tensors.weight.is_cuda for item in live)

    def _rests(self, item: LocalSlice, shard: BoundShard) -> bool:
        """Whether its anchor was never needed, and is not now."""
        return not item.settled and rests(self._binding.options[item.piece.layer], shard.param_group)

    def _look_at_file(self, item: LocalSlice, values: DiskValues) -> None:
        changed = lost(values)
        if changed is not None:
            self.lost[item.piece.layer], item.tensors.anchor = changed, None
            return
        tensor = values.whole()
        item.tensors.anchor = values if tensor is None else tensor

    @staticmethod
    def after_base(live: Sequence[LocalSlice]) -> None:
        """Release the gradients, and refresh the weights: the base step may put new tensors in place."""
        shards = list({id(item.shard): item.shard for item in live}.values())
        sharded = [(shard, owner) for shard in shards if isinstance(owner := shard.owner, DTensor)]
        for (shard, _), tensor in zip(sharded, local_tensors([o for _, o in sharded]), strict=True):
            shard.tensor = tensor
        for shard in shards:
            shard.grad = None
        for item in live:
            item.tensors.grad = None
            if item.tensors.weight is not item.shard.tensor:
                item.take_weight()

    def release(self, live: Sequence[LocalSlice] | None = None) -> None:
        """Release the weights (all by default): the engine may move or free them before the next step."""
        for item in self._all if live is None else live:
            if item.shard.owner is not None:
                item.shard.tensor = item.shard.owner
            else:
                item.shard = _GONE
            item.tensors.weight, item.tensors.anchor = _GONE.tensor, item.values
            item.kept, item.moved = None, False


def _needs_sums_only(spec: RuleSpec) -> bool:
    """Whether a kernel that steps the weights forms all sums that a rule needs."""
    plain = not (spec.keeps_w or spec.edits_grad or spec.shard_state) and spec.granularity == "layer"
    formed = all(stat in FORMED for stat in spec.before) and set(spec.after) <= {DELTA_SQ}
    return plain and formed and spec.when == "after"


def _factor(shard: BoundShard, grad: Tensor, grad_scale: Tensor | None) -> float | Tensor:
    sign = -1.0 if shard.param_group.get("maximize", False) else 1.0
    if grad_scale is None:
        return sign
    scale = grad_scale.to(grad.device, torch.float64)
    return sign / (scale.item() if scale.device.type == "cpu" else scale)


class _Places:
    """The indices of a batch's slices, on the plan's device, and the last table of them."""

    def __init__(self, slices: list[LocalSlice], device: torch.device) -> None:
        self.slices = slices
        self.columns = _upload([item.column for item in slices], device)
        """In the plan, `[num_slices]`."""
        self.index = _upload([item.index for item in slices], device)
        """Among the rule's layers, `[num_slices]`."""
        self.table: Table | None = None


def _upload(numbers: list[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, pin_memory=device.type == "cuda").to(device, non_blocking=True)


class KernelBatch:
    """Slices of one rule that one backend takes, for one step. They have gradients when it is made."""

    def __init__(self, backend: Backend, places: _Places) -> None:
        self.slices = places.slices
        self.layers = self.slices[0].layers
        self._backend = backend
        self._places = places
        self._make_table()

    def _make_table(self) -> None:
        self._weights = [item.tensors.weight.data_ptr() for item in self.slices]
        tensors = [item.tensors for item in self.slices]
        self._table = self._places.table = self._backend.table(tensors, self._places.table)

    def add(self, phase: Phase, sums: Sums) -> None:
        """Add its rule's statistics: by the kernel if it forms them all, else all in plain torch."""
        spec = self.layers.rule.spec
        wanted = spec.before if phase == "before" else spec.after
        if any(stat not in FORMED for stat in wanted):
            for item in self.slices:
                item.add_to(sums, phase, wanted)
        elif wanted:
            self._find_weights()
            sums.add_formed(phase, wanted, self._places.columns, self._table.sums(grads=phase == "before"))

    def adam_(self, moments: Sequence[Moments], numbers: Tensor, sums: Sums) -> None:
        """Step the slices as Adam does (modified in place), and add the statistics before and after it."""
        rows, spec = self._table.adam_(moments, numbers), self.layers.rule.spec
        sums.add_formed("before", spec.before, self._places.columns, rows)
        # The last two columns stand as in a row of sums: the second is |d|^2 after the step.
        sums.add_formed("after", spec.after, self._places.columns, rows[:, 1:])
        for item in self.slices:
            item.write_back()

    def pull_(self, s: Tensor) -> None:
        """Pull the slices (modified in place) by `s`, float64 `[num_layers]` of their rule."""
        self._find_weights()
        device = self.slices[0].tensors.weight.device
        self._table.pull_(s.index_select(0, self._places.index).to(device, non_blocking=True))
        for item in self.slices:
            item.write_back()

    def _find_weights(self) -> None:
        """Rebuild the table if the base optimizer has put new tensors in place."""
        if [item.tensors.weight.data_ptr() for item in self.slices] != self._weights:
            self._make_table()


class KernelBatches:
    """Groups slices into batches; persists from step to step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._places: dict[tuple[int, str, str, torch.device], _Places] = {}

    def of(self, slices: Sequence[LocalSlice], purpose: str) -> list[KernelBatch]:
        """The batches of `slices`; per `purpose` they are mostly like those of the last step."""
        groups: dict[tuple[int, str, str, torch.device], tuple[Backend, list[LocalSlice]]] = {}
        last: tuple[RuleLayers, Backend, torch.device] | None = None
        members: list[LocalSlice] = []
        for item in slices:
            layers, backend, device = now = (item.layers, item.backend, item.tensors.weight.device)
            if now != last:
                last, key = now, (layers.number, purpose, backend.name, device)
                _, members = groups.setdefault(key, (backend, []))
            members.append(item)
        batches = []
        for key, (backend, members) in groups.items():
            places = self._places.get(key)
            if places is None or places.slices != members:
                last_table = None if places is None else places.table
                places = self._places[key] = _Places(members, self._device)
                places.table = last_table
            batches.append(KernelBatch(backend, places))
        return batches
