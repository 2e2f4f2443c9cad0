"""Engines whose optimizer holds the model's own parameters: one process, DDP, FSDP2, HSDP, TP.

Plain tensors and DTensors, on any meshes, may mix in one optimizer: each parameter describes itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sharded_spd.engines.base import made_up_name
from sharded_spd.engines.dtensor import (
    aligned_grad,
    as_dtensor,
    local_tensor,
    mesh_groups,
    shard_groups,
    whole_slice,
)
from sharded_spd.errors import BindingError, UnsupportedError
from sharded_spd.layout import BoundShard, Scope, ShardLayout, ShardSlice
from sharded_spd.names import clean_fqns


class ParameterAdapter:
    """Describes the parameters of `optimizers`; names come from `model`, else from `param_names`.

    `group`: ranks that hold replicas, where the model itself does not tell.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        model: Module | None = None,
        *,
        group: ProcessGroup | None = None,
    ) -> None:
        self.optimizers: Sequence[Optimizer] = tuple(optimizers)
        self.named = False
        self.names: dict[Tensor, str] = {}
        self._model_fqns: tuple[str, ...] = ()
        self._slices: dict[Tensor, ShardSlice] = {}
        self.params: dict[str, Tensor] = {}
        self._groups: dict[tuple[int, ...], ProcessGroup] = {}
        self._stepped: set[Optimizer] = set()
        self._ddp_group = group
        self._model: Callable[[], Module | None] = lambda: None
        self._learn_names(model)

    def _learn_names(self, model: Module | None) -> None:
        model = self._model() if model is None else model
        if model is None:
            return
        self._model = weakref.ref(model)
        if isinstance(model, DistributedDataParallel):
            self._ddp_group = model.process_group
        # An FSDP2 root stays unsharded after a forward without backward; its named parameters are then not
        # the sharded ones that the optimizer holds.
        for module in model.modules():
            reshard = getattr(module, "reshard", None)
            if callable(reshard) and hasattr(module, "set_reshard_after_backward"):
                reshard()
        named = list(model.named_parameters(remove_duplicate=False))
        self._model_fqns = tuple(clean_fqns([name for name, _ in named]))
        self.names = {}
        for fqn, (_, param) in zip(self._model_fqns, named, strict=True):
            self.names.setdefault(param, fqn)

    @property
    def agreement_groups(self) -> Sequence[ProcessGroup]:
        """The groups of all axes of the layers' meshes, replicated ones too, and DDP's."""
        return [*self._groups.values(), *([self._ddp_group] if self._ddp_group is not None else [])]

    def layout(self, model: Module | None = None) -> ShardLayout | None:
        """Describe the parameters as they are now; None while some are on the meta device or empty shells.

        Raises:
            UnsupportedError: for a parameter that cannot be projected.
            BindingError: for two parameters under one name, or one that the model does not have.
        """
        self._learn_names(model)
        slices: dict[Tensor, ShardSlice] = {}
        params: dict[str, Tensor] = {}
        scopes: dict[tuple[int, ...], tuple[ProcessGroup, list[str]]] = {}
        groups: dict[tuple[int, ...], ProcessGroup] = {}
        named = True
        for fqn, param, own_name in self._walk():
            if param.is_meta or (hasattr(param, "ds_id") and param.numel() == 0):
                return None
            if param.is_complex() or not param.is_floating_point():
                raise UnsupportedError(
                    f"layer {fqn!r} has dtype {param.dtype}; wanted a real floating-point dtype"
                )
            if param in slices:
                raise BindingError(
                    f"layer {fqn!r} is in the optimizers twice; give every parameter to one group only"
                )
            if fqn in params:
                raise BindingError(
                    f"two parameters are named {fqn!r}; wanted one name each: pass model.named_parameters()"
                )
            named = named and own_name
            slices[param], params[fqn] = whole_slice(fqn, param), param
            for group in shard_groups(param):
                # By ranks, for equal meshes made twice have groups of their own: one reduction serves them.
                ranks = tuple(dist.get_process_group_ranks(group))
                scopes.setdefault(ranks, (group, []))[1].append(fqn)
            for group in mesh_groups(param):
                groups.setdefault(tuple(dist.get_process_group_ranks(group)), group)
        if self.names and not any(param in self.names for param in params.values()):
            raise BindingError(
                f"the model given has none of the optimizer's {len(params)} parameters; pass the model that "
                "they were taken from, as it was then wrapped or sharded"
            )
        renamed = {self._slices[p].layer: fqn for fqn, p in params.items() if p in self._slices}
        self._slices, self.params, self._groups, self.named = slices, params, groups, named
        shapes = {fqn: tuple(p.shape) for fqn, p in params.items()}
        whole = tuple(Scope(group, tuple(layers)) for group, layers in scopes.values())
        return ShardLayout(tuple(params), shapes, whole, self._model_fqns, renamed)

    def _walk(self) -> Iterator[tuple[str, Tensor, bool]]:
        several = len(self.optimizers) > 1
        for o, optimizer in enumerate(self.optimizers):
            prefix = f"optimizers[{o}]." if several else ""
            own = [n for g in optimizer.param_groups for n in g.get("param_names", ())]
            cleaned = dict(zip(own, clean_fqns(own), strict=True))
            for g, group in enumerate(optimizer.param_groups):
                for i, param in enumerate(group["params"]):
                    names = group.get("param_names", ())
                    given = cleaned[names[i]] if i < len(names) else None
                    name = self.names.get(param, given)
                    yield prefix + made_up_name(g, i) if name is None else name, param, name is not None

    def bind(self, optimizer: Optimizer, *, grads: bool) -> Sequence[BoundShard]:
        """The local shard, local gradient and slice of every parameter of `optimizer`, in group order.

        Raises:
            BindingError: for a parameter that `layout()` has not seen.
            UnsupportedError: for a sparse gradient.
        """
        shards = []
        for g, group in enumerate(optimizer.param_groups):
            for i, param in enumerate(group["params"]):
                piece = self._slices.get(param)
                if piece is None:
                    self._raise_unknown(optimizer, group, g, i)
                    continue
                if param.untyped_storage().size() == 0 and piece.numel and not isinstance(param, DTensor):
                    self._raise_freed(piece.layer)
                grad = self._grad(param, piece.layer) if grads else None
                has_state = bool(optimizer.state.get(param))
                local = local_tensor(param)
                shards.append(BoundShard(local, grad, (piece,), group, param.requires_grad, has_state))
        return shards

    @staticmethod
    def _grad(param: Tensor, fqn: str) -> Tensor | None:
        if param.grad is not None and param.grad.layout != torch.strided:
            raise UnsupportedError(
                f"layer {fqn!r} has a sparse gradient ({param.grad.layout}); wanted a dense one: construct "
                "the embedding with sparse=False"
            )
        return aligned_grad(param)

    def _raise_unknown(self, optimizer: Optimizer, group: Mapping[str, Any], g: int, i: int) -> None:
        names = group.get("param_names")
        name = names[i] if names else made_up_name(g, i)
        raise BindingError(
            f"parameter {name!r} (shape {tuple(group['params'][i].shape)}) of {type(optimizer).__name__} is "
            "not bound: it was added, or put in place of another one, after binding; call bind() after "
            "sharding, after adding groups, and before the next step"
        )

    @staticmethod
    def _raise_freed(fqn: str) -> None:
        raise BindingError(
            f"layer {fqn!r} has no memory: the optimizer holds FSDP's gathered parameter, which is freed "
            "after use, not its shard; build the optimizer right after fully_shard, or call "
            "model.reshard() before it is built"
        )

    def inner_steps(self, optimizer: Optimizer) -> Sequence[Sequence[BoundShard]]:
        """One call, of everything."""
        return [self.bind(optimizer, grads=False)]

    def boundary(self, optimizer: Optimizer) -> bool:
        """True once all optimizers have stepped, and when one steps again before the others have."""
        again = optimizer in self._stepped
        self._stepped.add(optimizer)
        if again:
            self._stepped = {optimizer}
        elif len(self._stepped) == len(self.optimizers):
            self._stepped = set()
            return True
        return again

    def rewrite(self, shards: Sequence[BoundShard]) -> None:
        """Nothing: the optimizer holds the model's own parameters."""

    def mark(self, fingerprint: str | None) -> None:
        """Nothing: the projector's and AdamSPD's state carry it."""

    def export(self, fqn: str, local: Tensor) -> Tensor:
        """A DTensor like the parameter, or the plain tensor in the parameter's shape."""
        return as_dtensor(local, self.params[fqn])

    def restore(self, fqn: str, saved: Tensor) -> Tensor:
        """This rank's shard of what `export` gave."""
        return local_tensor(saved).reshape(-1)
