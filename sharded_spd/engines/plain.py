"""Engines with the model's parameters in the optimizer, or tensors that the wrapped model can explain.

One process, DDP, FSDP2, HSDP, TP: each parameter describes itself. FSDP1 and fairscale: the model's wrappers
do. ZeroRedundancyOptimizer and OSS: full parameters, different ones on each rank. One optimizer may mix all.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn import Module
from torch.optim import Optimizer

from sharded_spd.engines.base import keep, made_up_name
from sharded_spd.engines.dtensor import (
    Boxes,
    align_grads,
    aligned_grads,
    as_dtensor,
    local_tensor,
    local_tensors,
    mesh_groups,
    shard_groups,
    whole_slice,
)
from sharded_spd.engines.fairscale import BucketWatch, bucket_watch
from sharded_spd.engines.flat import FlatPiece, gather_whole, take_piece
from sharded_spd.engines.model import ModelView, is_flat, replicas_of, view_model
from sharded_spd.engines.param_refusals import (
    REAL,
    check_dtype,
    is_left_alone,
    name_of,
    raise_moved,
    raise_unknown,
    raise_unreal,
)
from sharded_spd.engines.partitioned import names_of
from sharded_spd.engines.process_groups import known_groups, scopes_of
from sharded_spd.engines.replaced import check_replaced, check_still_there
from sharded_spd.engines.stages import is_stage
from sharded_spd.errors import BindingError, UnsupportedError
from sharded_spd.sharding.layout import BoundShard, ShardLayout, ShardSlice
from sharded_spd.sharding.names import clean_fqns


@dataclass(slots=True)
class _Lineup:
    """The tensors of an optimizer, as of the last pass through its groups.

    `alone`: tensors that are no layers, with their names.
    """

    rows: list[tuple[BoundShard, Tensor, FlatPiece]]
    alone: list[tuple[str, Tensor]]
    groups: list[tuple[Mapping[str, Any], list[Tensor]]]

    @property
    def shards(self) -> list[BoundShard]:
        return [shard for shard, _, _ in self.rows]

    def fits(self, optimizer: Optimizer) -> bool:
        """Whether the groups still have the same tensors."""
        now = optimizer.param_groups
        return len(now) == len(self.groups) and all(
            group is known and len(group["params"]) == len(params) and all(map(is_, group["params"], params))
            for group, (known, params) in zip(now, self.groups, strict=True)
        )


class ParameterAdapter:
    """Describes the parameters of `optimizers`; names come from `model`, else from `param_names`.

    `group`: ranks that hold replicas, if the model itself does not show it. `wholes`: the outer optimizers,
    if each of `optimizers` has only a share of the parameters; `everywhere`: their ranks.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        model: Module | None = None,
        *,
        group: ProcessGroup | None = None,
        wholes: Sequence[Optimizer] = (),
        everywhere: ProcessGroup | None = None,
    ) -> None:
        self.optimizers: Sequence[Optimizer] = tuple(optimizers)
        self.named = False
        self.names: dict[Tensor, str] = {}
        self.params: dict[str, Tensor] = {}
        self._parts: dict[Tensor, FlatPiece] = {}
        self._pieces: dict[str, tuple[ShardSlice, FlatPiece]] = {}
        self._dtypes: dict[Tensor, torch.dtype] = {}
        self._groups: Sequence[ProcessGroup] = ()
        self._stepped: set[Optimizer] = set()
        self._lineups: dict[Optimizer, _Lineup] = {}
        self._replicas = group
        self._wholes, self._everywhere = tuple(wholes), everywhere
        self._num_groups: list[int] = []
        self._buckets: BucketWatch | None = None
        self._idle: dict[Optimizer, bool] = {}
        self._view = ModelView()
        self._model: Callable[[], Module | None] = lambda: None
        self._no_model = False
        self.take_model(model)
        with suppress(Exception):  # layout() looks again, and then all ranks raise the error
            self._look()

    def take_model(self, model: Module | None) -> None:
        """See `EngineAdapter`."""
        if model is not None:
            self._no_model = not isinstance(model, Module)
        if isinstance(model, Module):
            self._model = weakref.ref(model)
        self._sought = False  # a wrapper may have been put around it since

    def _tensors(self) -> list[Tensor]:
        return [param for o in self.optimizers for group in o.param_groups for param in group["params"]]

    def _look(self) -> None:
        model = self._model()
        if model is None:
            return
        self._view = view_model(model)
        self._replicas = self._view.replicas or self._replicas
        self.names = dict(self._view.names)

    @property
    def replicas(self) -> ProcessGroup | None:
        """The ranks that hold replicas of a model in DistributedDataParallel; None if unknown."""
        return self._seek_replicas(self._tensors())

    def _seek_replicas(self, params: Sequence[Tensor]) -> ProcessGroup | None:
        if self._replicas is None and not self._sought:
            self._replicas, self._sought = replicas_of(params), True
        return self._replicas

    @property
    def agreement_groups(self) -> Sequence[ProcessGroup]:
        """The groups of all axes of the layers' meshes, replicated ones too, DDP's, and `everywhere`.

        Taken from the current parameters and wrappers: ranks must agree on the result of a layout before
        there is one.
        """
        return self.groups_of(self._tensors())

    def groups_of(self, params: Sequence[Tensor]) -> Sequence[ProcessGroup]:
        """`agreement_groups` of `params`, which an optimizer is about to take."""
        others = (*self._groups, self._seek_replicas(params), self._everywhere)
        return known_groups(params, self._model(), others)

    def keep(self) -> Callable[[], None]:
        """See `EngineAdapter`."""
        return keep(self)

    def layout(self, model: Module | None = None) -> ShardLayout | None:
        """Describe the parameters as they are now; None while some are on the meta device or empty shells.

        Raises:
            UnsupportedError: a parameter cannot be projected.
            BindingError: two parameters have one name, or the model lacks a parameter.
        """
        if model is not None:
            self.take_model(model)
        if self._no_model:
            raise UnsupportedError("got something else as the model; wanted a torch.nn.Module: model=...")
        self._look()
        parts: dict[Tensor, FlatPiece] = {}
        pieces: dict[str, tuple[ShardSlice, FlatPiece]] = {}
        params: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        named, boxes = True, Boxes()
        for fqn, param, own_name in self._walk():
            if is_left_alone(param):
                continue
            if param.is_meta or (hasattr(param, "ds_id") and param.numel() == 0):
                check_replaced({param: [fqn]}, self._view)
                return None
            part = self._part(fqn, param, boxes)
            if param in parts:
                raise BindingError(
                    f"layer {fqn!r} is in the optimizers twice; give every parameter to one group only"
                )
            parts[param], named = part, named and own_name
            for piece, shape in zip(part.slices, part.shapes, strict=True):
                if piece.layer in params:
                    raise BindingError(
                        f"two parameters are named {piece.layer!r}; wanted one name each: pass "
                        "model.named_parameters()"
                    )
                params[piece.layer], shapes[piece.layer], pieces[piece.layer] = param, shape, (piece, part)
        known = self._view.names.keys() | self._view.parts.keys()
        if known and params and known.isdisjoint(params.values()):
            raise BindingError(
                f"the model given has none of the optimizer's {len(params)} parameters; pass the model that "
                "they were taken from, as it was then wrapped or sharded"
            )
        check_replaced({param: [fqn] for fqn, param in params.items()}, self._view, parts)
        renamed = {
            before.layer: now.layer
            for param, part in parts.items()
            if param in self._parts
            for before, now in zip(self._parts[param].slices, part.slices, strict=False)
        }
        self._parts, self._pieces, self.params, self.named = parts, pieces, params, named
        self._lineups, self._idle, self._buckets = {}, {}, bucket_watch()
        self._dtypes = {param: param.dtype for param in parts}
        self._num_groups = [len(whole.param_groups) for whole in self._wholes]
        self._groups = list(dict.fromkeys(group for part in parts.values() for group in part.groups))
        scopes, view, everywhere = scopes_of(pieces), self._view, self._everywhere
        stage = is_stage(list(parts), self._model(), params)
        return ShardLayout(
            tuple(params),
            shapes,
            scopes,
            view.fqns,
            renamed,
            everywhere=everywhere,
            stage=stage,
            facts=view.facts,
        )

    def _part(self, fqn: str, param: Tensor, boxes: Boxes) -> FlatPiece:
        if param.dtype not in REAL:
            raise_unreal(fqn, param)
        part = self._view.parts.get(param)
        if part is not None:
            return part
        if is_flat(param):
            raise BindingError(
                f"parameter {fqn!r} is sharded by FullyShardedDataParallel, and only the wrapped model knows "
                "which slice of which layer it is; pass the outermost wrapper: AdamSPD(..., model=model), "
                "attach(optimizer, model)"
            )
        numel, shape = local_tensor(param).numel(), tuple(param.shape)
        split, groups = tuple(shard_groups(param)), tuple(mesh_groups(param))
        return FlatPiece((whole_slice(fqn, param, boxes),), (shape,), numel, split, groups, flat=False)

    def _walk(self) -> Iterator[tuple[str, Tensor, bool]]:
        several = len(self.optimizers) > 1
        whole, whole_named = names_of(self._wholes)
        for o, optimizer in enumerate(self.optimizers):
            prefix = f"optimizers[{o}]." if several else ""
            own = [n for g in optimizer.param_groups for n in g.get("param_names", ())]
            cleaned = dict(zip(own, clean_fqns(own), strict=True))
            for g, group in enumerate(optimizer.param_groups):
                for i, param in enumerate(group["params"]):
                    if param in self.names or param in self._view.parts:
                        yield self.names.get(param, prefix + made_up_name(g, i)), param, True
                    elif self._wholes:
                        yield whole.get(param, prefix + made_up_name(g, i)), param, whole_named
                    elif i < len(group.get("param_names", ())):
                        yield cleaned[group["param_names"][i]], param, True
                    else:
                        yield prefix + made_up_name(g, i), param, False

    def bind(self, optimizer: Optimizer, *, grads: bool) -> Sequence[BoundShard]:
        """The local shard, local gradient and slice of every parameter of `optimizer`, in group order.

        Raises:
            BindingError: `layout()` has not seen a parameter, or the model no longer has it.
            UnsupportedError: a gradient is sparse.
        """
        try:
            return self._bind(optimizer, grads=grads)
        except Exception:
            if grads:
                align_grads(optimizer)
            raise

    def _bind(self, optimizer: Optimizer, *, grads: bool) -> Sequence[BoundShard]:
        for whole, known in zip(self._wholes, self._num_groups, strict=True):
            if len(whole.param_groups) != known:  # this rank may have no share of the new group
                raise BindingError(
                    f"{type(whole).__name__} has {len(whole.param_groups)} param groups, {known} when the "
                    "anchors were bound; call bind() after adding groups, and before the next step"
                )
        lineup = self._lineups.get(optimizer) if grads else None
        if lineup is None or not lineup.fits(optimizer):
            lineup = self._line_up(optimizer)
            if grads:
                self._lineups[optimizer] = lineup
        weights = [param if part.local is None else part.local() for _, param, part in lineup.rows]
        sharded = [i for i, weight in enumerate(weights) if isinstance(weight, DTensor)]
        for i, local in zip(sharded, local_tensors([weights[i] for i in sharded]), strict=True):
            weights[i] = local
        local_grads = self._grads(lineup) if grads else [None] * len(weights)
        for (shard, param, part), local, grad in zip(lineup.rows, weights, local_grads, strict=True):
            shard.tensor = local
            if local.numel() != part.numel or (part.numel and local.data_ptr() == 0):
                raise_moved(param, local, part)
            shard.requires_grad = param.requires_grad
            shard.grad = grad
            shard.has_state = shard.has_state or bool(optimizer.state.get(param))
            if grads and local.dtype != self._dtypes[param]:
                check_dtype(local.dtype, self._dtypes[param], shard)
                self._dtypes[param] = local.dtype
        for name, param in lineup.alone if grads else ():
            if param.grad is not None:
                raise_unreal(name, param)
        shards = lineup.shards
        if grads and self._buckets is not None:
            self._buckets.look(self._parts)
        idle = all(shard.grad is None for shard in shards)
        if grads and idle is not self._idle.get(optimizer):
            check_still_there(optimizer, self._model(), idle, self._idle.get(optimizer), self._parts)
            self._idle[optimizer] = idle
        return shards

    def _line_up(self, optimizer: Optimizer) -> _Lineup:
        rows, alone = [], []
        for g, group in enumerate(optimizer.param_groups):
            for i, param in enumerate(group["params"]):
                part = self._parts.get(param)
                if part is None and param.dtype not in REAL:
                    if param.requires_grad:
                        raise_unreal(name_of(group, g, i), param)
                    alone.append((name_of(group, g, i), param))
                    continue
                if part is None:
                    raise_unknown(optimizer, group, g, i)
                    continue
                owner = param if part.local is None else None
                shard = BoundShard(
                    param, None, part.slices, group, param.requires_grad, owner=owner, key=param
                )
                rows.append((shard, param, part))
        return _Lineup(rows, alone, [(group, list(group["params"])) for group in optimizer.param_groups])

    @staticmethod
    def _grads(lineup: _Lineup) -> list[Tensor | None]:
        """The local gradients."""
        for _, param, part in lineup.rows:
            if param.grad is not None and param.grad.layout != torch.strided:
                raise UnsupportedError(
                    f"layer {part.slices[0].layer!r} has a sparse gradient ({param.grad.layout}); wanted a "
                    "dense one: construct the embedding with sparse=False"
                )
        grads = [param.grad for _, param, _ in lineup.rows]
        sharded = [i for i, (_, param, _) in enumerate(lineup.rows) if isinstance(param, DTensor)]
        aligned = aligned_grads([lineup.rows[i][1] for i in sharded])
        for i, grad in zip(sharded, aligned, strict=True):
            grads[i] = grad
        return grads

    def inner_steps(self, optimizer: Optimizer) -> Sequence[Sequence[BoundShard]]:
        """One call with all shards."""
        return [self.bind(optimizer, grads=False)]

    def boundary(self, optimizer: Optimizer) -> bool:
        """True once all optimizers have stepped, or when one steps again before the others have."""
        again = optimizer in self._stepped
        self._stepped.add(optimizer)
        if again:
            self._stepped = {optimizer}
        elif len(self._stepped) == len(self.optimizers):
            self._stepped = set()
            return True
        return again

    def rewrite(self, shards: Sequence[BoundShard]) -> None:
        """No-op: the optimizer holds the model's own parameters."""

    def tag_param_groups(self, fingerprint: str | None) -> None:
        """No-op: the state of the projector and of AdamSPD carries it."""

    def export(self, fqn: str, local: Tensor) -> Tensor:
        """A DTensor like the parameter, a plain tensor in its shape, or the full layer if it is flat.

        Collective over the layer's groups if it is flat.
        """
        piece, part = self._pieces[fqn]
        if not part.flat:
            return as_dtensor(local, self.params[fqn])
        return gather_whole(local, piece, part.shapes[part.slices.index(piece)], part.split)

    def restore(self, fqn: str, saved: Tensor) -> Tensor:
        """This rank's shard of a result of `export`."""
        piece, part = self._pieces[fqn]
        return take_piece(saved, piece) if part.flat else local_tensor(saved).reshape(-1)
