"""DeepSpeed: ZeRO stages 1 to 3, and stage 0 in half precision, around any inner optimizer.

Stage 0 in float32 has the model's own parameters in its optimizer and needs none of this (`plain`).
"""

from __future__ import annotations

import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from sharded_spd.engines.base import keep
from sharded_spd.engines.facts import facts_of
from sharded_spd.engines.flat import gather_whole, take_piece
from sharded_spd.engines.plain import ParameterAdapter
from sharded_spd.engines.zero_layout import Flat, holds_exactly, read_flats
from sharded_spd.engines.zero_refusals import check_engine
from sharded_spd.engines.zero_resume import GroupMarks
from sharded_spd.errors import BindingError, UnsupportedError
from sharded_spd.sharding.layout import BoundShard, Scope, ShardLayout, ShardSlice
from sharded_spd.sharding.names import clean_fqns

_EXPERT = re.compile(r"(.*\bdeepspeed_experts\.)(\d+)(\..*)")


def is_deepspeed_engine(target: Any) -> bool:
    """Whether `target` is the engine that `deepspeed.initialize` returns, with an optimizer inside."""
    return hasattr(target, "basic_optimizer") and hasattr(target, "zero_optimization_stage")


def is_of_deepspeed(model: Any) -> bool:
    """Whether `model` is an engine, with or without an optimizer."""
    return any(cls.__module__.startswith("deepspeed.") for cls in type(model).__mro__)


def refuse_flat_optimizer(optimizer: Optimizer) -> None:
    """Refuse DeepSpeed's flats, which are not parameters: taken for a layer, each would be pulled as one.

    Raises:
        UnsupportedError: the optimizer is inside an engine.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    flat = any(p.ndim == 1 and not isinstance(p, Parameter) for p in params)
    if "deepspeed" in sys.modules and (flat or not params):
        raise UnsupportedError(
            f"this {type(optimizer).__name__} holds no parameters of a model, as one inside of a DeepSpeed "
            "engine; wanted the engine: attach(engine)"
        )


def json_block(engine: Any) -> Mapping[str, Any] | None:
    """The block "sharded_spd" of the JSON that the engine was configured with."""
    given = engine.config
    if not isinstance(given, Mapping):
        given = getattr(getattr(engine, "_config", None), "_param_dict", None) or {}
    block: Mapping[str, Any] | None = given.get("sharded_spd")
    return block


def deepspeed_adapter(engine: Any, *, per_step: bool) -> DeepSpeedAdapter | WholeAdapter:
    """The adapter of an engine.

    Raises:
        UnsupportedError: under a setting, the projection would be wrong or would not run.
    """
    check_engine(engine, per_step=per_step)
    zero = engine._config.zero_config
    if getattr(zero, "round_robin_gradients", False) and engine.zero_optimization_stage() in (1, 2):
        warnings.warn(
            "zero_optimization.round_robin_gradients is on: training and resuming are right, but DeepSpeed "
            "mixes up layers in a universal checkpoint made of this run; turn it off to resume at another "
            "world size",
            stacklevel=3,
        )
    if isinstance(engine.optimizer, Optimizer):
        return WholeAdapter([engine.optimizer], engine.module, group=data_parallel_group(engine))
    return DeepSpeedAdapter(engine)


def data_parallel_group(engine: Any) -> ProcessGroup | None:
    """The ranks that an engine runs on."""
    group: ProcessGroup | None = getattr(engine, "data_parallel_group", None)
    return group if group is not None or not dist.is_initialized() else dist.group.WORLD


class WholeAdapter(ParameterAdapter):
    """Stage 0 in float32: the model's own parameters, and DeepSpeed's checkpoints."""

    _marks: GroupMarks | None = None

    def tag_param_groups(self, fingerprint: str | None) -> None:
        """As `DeepSpeedAdapter.tag_param_groups`."""
        self._marks = _marked(self._marks, self.optimizers[0], fingerprint)


def _marked(marks: GroupMarks | None, optimizer: Optimizer, fingerprint: str | None) -> GroupMarks | None:
    if marks is not None and marks.fingerprint == fingerprint:
        return marks
    if marks is not None:
        marks.remove()
    return None if fingerprint is None else GroupMarks(optimizer, fingerprint)


class DeepSpeedAdapter:
    """Describes the flats of `engine`'s inner optimizer; a layer is a slice of one, or of one per rank."""

    named = True

    def __init__(self, engine: Any) -> None:
        # The engine's optimizer refers to this by its hooks: a strong reference back would keep both alive.
        self._engine = weakref.proxy(engine)
        self._wrapper = weakref.proxy(engine.optimizer)
        self.optimizers: Sequence[Optimizer] = (engine.optimizer.optimizer,)
        self._flats: list[Flat] = []
        self._by_tensor: dict[Tensor, Flat] = {}
        self._exact: list[bool] = []
        self._stepped: set[Tensor] = set()
        self._current: set[Tensor] = set()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._where: dict[str, tuple[ShardSlice, ProcessGroup | None]] = {}
        self._groups: dict[tuple[int, ...], ProcessGroup] = {}
        self._marks: GroupMarks | None = None
        named = list(engine.module.named_parameters(remove_duplicate=False))
        cleaned, params = clean_fqns([name for name, _ in named]), [param for _, param in named]
        self._model_fqns = tuple(_with_global_experts(cleaned, params))
        self.names: dict[Tensor, str] = {}
        for fqn, param in zip(self._model_fqns, params, strict=True):
            self.names.setdefault(param, fqn)
        by_raw = {raw: fqn for (raw, _), fqn in zip(named, self._model_fqns, strict=True)}
        self._facts = facts_of(engine.module, named, by_raw)

    @property
    def agreement_groups(self) -> Sequence[ProcessGroup]:
        """The data-parallel group, and the groups that split any layer."""
        whole = data_parallel_group(self._engine)
        if whole is None:
            return []
        return list({tuple(dist.get_process_group_ranks(whole)): whole, **self._groups}.values())

    def take_model(self, model: Module | None) -> None:
        """No-op: the engine has the model."""

    def keep(self) -> Callable[[], None]:
        """See `EngineAdapter`."""
        return keep(self)

    def layout(self, model: Module | None = None) -> ShardLayout:
        """Read the flats and check them against the live weights, on this rank alone.

        Raises:
            UnsupportedError: their layout is unknown.
        """
        names = self.names
        self._flats = read_flats(self._wrapper, names)
        self._by_tensor = {flat.tensor: flat for flat in self._flats}
        self._exact = [flat.preloaded or holds_exactly(flat) for flat in self._flats]
        whole = {fqn: tuple(getattr(p, "ds_shape", p.shape)) for p, fqn in names.items()}
        scopes: dict[tuple[int, ...], tuple[ProcessGroup, list[str]]] = {}
        self._shapes, self._where, self._groups = {}, {}, {}
        for flat in self._flats:
            group = flat.process_group
            ranks = () if group is None else tuple(dist.get_process_group_ranks(group))
            if group is not None and len(ranks) > 1:
                group = self._groups.setdefault(ranks, group)
                scopes.setdefault(ranks, (group, []))[1].extend(piece.layer for piece in flat.slices)
            for piece in flat.slices:
                self._shapes[piece.layer] = whole[piece.layer]
                self._where[piece.layer] = (piece, group if len(ranks) > 1 else None)
        scoped = tuple(Scope(group, tuple(layers)) for group, layers in scopes.values())
        experts = any(not getattr(param, "allreduce", True) for param in names)
        everywhere = data_parallel_group(self._engine) if experts else None
        # This rank does not know the names of other ranks' experts.
        model_fqns = () if experts else self._model_fqns
        return ShardLayout(
            tuple(self._shapes), self._shapes, scoped, model_fqns, everywhere=everywhere, facts=self._facts
        )

    def bind(self, optimizer: Optimizer, *, grads: bool) -> Sequence[BoundShard]:
        """All flats; with `grads` those of the inner call that is about to run.

        Raises:
            BindingError: a tensor is not one of the flats.
            AnchorError: the loaded checkpoint was written with another anchor.
        """
        if not grads:
            return [shard for call in self.inner_steps(optimizer) for shard in call]
        if self._marks is not None:
            self._marks.mend(optimizer, getattr(self._engine, "lr_scheduler", None))
        shards = []
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                flat = self._by_tensor.get(tensor)
                if flat is None:
                    raise BindingError(
                        f"DeepSpeed steps a tensor of {tensor.numel()} elements that it did not have when "
                        "the engine was attached to; call bind() on the projector"
                    )
                stepped = self._has_stepped(optimizer, flat)
                vouched = self._marks is not None and self._marks.vouched
                key = None if vouched else tensor
                shards.append(
                    BoundShard(tensor.detach(), tensor.grad, flat.slices, group, has_state=stepped, key=key)
                )
        self._current = {tensor for group in optimizer.param_groups for tensor in group["params"]}
        return shards

    def inner_steps(self, optimizer: Optimizer) -> Sequence[Sequence[BoundShard]]:
        """The flats of each call of `optimizer.step` in one engine step, in order."""
        groups = optimizer.param_groups
        shards = [self._at_rest(optimizer, i, groups[f.param_group]) for i, f in enumerate(self._flats)]
        return [shards] if self._one_call else [[shard] for shard in shards]

    def _has_stepped(self, optimizer: Optimizer, flat: Flat) -> bool:
        """Whether `flat` has stepped: in this run, in the loaded checkpoint's, or (stage 0) in initialize."""
        loaded = self._marks is not None and self._marks.vouched
        return flat.preloaded or loaded or bool(optimizer.state.get(flat.tensor))

    @property
    def _one_call(self) -> bool:
        """Whether one call steps all flats; stages 1, 2 and 3 step flat by flat."""
        stepwise = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
        return not any(hasattr(self._wrapper, name) for name in stepwise)

    def _at_rest(self, optimizer: Optimizer, index: int, group: Mapping[str, Any]) -> BoundShard:
        flat = self._flats[index]
        master = flat.tensor.detach().view(-1)
        if master.numel() == 0 and flat.low.numel():  # on NVMe
            master = flat.low.to(master.device)
        # An exact low-precision copy takes half the memory as an anchor.
        origin = flat.low if self._exact[index] and flat.low.dtype.itemsize < master.dtype.itemsize else None
        stepped = self._has_stepped(optimizer, flat)
        return BoundShard(
            master, None, flat.slices, group, has_state=stepped, origin=flat.low if flat.preloaded else origin
        )

    def boundary(self, optimizer: Optimizer) -> bool:
        """True once all flats have stepped, or when one steps again before the others have."""
        again = not self._stepped.isdisjoint(self._current)
        self._stepped = set(self._current) if again else self._stepped | self._current
        if not again and len(self._stepped) == len(self._flats):
            self._stepped = set()
            return True
        return again

    def rewrite(self, shards: Sequence[BoundShard]) -> None:
        """Copy flats of earlier inner calls to the model's working weights again."""
        layers = {piece.layer for shard in shards for piece in shard.slices}
        for flat in self._flats:
            if any(piece.layer in layers for piece in flat.slices):
                flat.low.detach().copy_(flat.tensor.detach().view(-1))

    def tag_param_groups(self, fingerprint: str | None) -> None:
        """Store the anchors' fingerprint in the param groups, and compare it with loaded ones."""
        self._marks = _marked(self._marks, self.optimizers[0], fingerprint)

    def export(self, fqn: str, local: Tensor) -> Tensor:
        """The full layer, on the host: DeepSpeed's checkpoints have no form that can be resharded.

        Collective over the layer's group.
        """
        piece, group = self._where[fqn]
        return gather_whole(local, piece, self._shapes[fqn], [] if group is None else [group])

    def restore(self, fqn: str, saved: Tensor) -> Tensor:
        """This rank's shard of a full layer."""
        return take_piece(saved, self._where[fqn][0])


def _with_global_experts(fqns: Sequence[str], params: Sequence[Tensor]) -> Iterator[str]:
    """The names with each expert's global number: DeepSpeed counts those of a rank from 0."""
    matches = [_EXPERT.match(fqn) for fqn in fqns]
    here: dict[str, int] = {}
    for match in matches:
        if match is not None:
            here[match[1]] = max(here.get(match[1], 0), int(match[2]) + 1)
    for fqn, param, match in zip(fqns, params, matches, strict=True):
        if match is None or getattr(param, "allreduce", True):
            yield fqn
            continue
        from deepspeed.utils import groups

        rank = groups._get_expert_parallel_rank(getattr(param, "group_name", None))
        yield f"{match[1]}{rank * here[match[1]] + int(match[2])}{match[3]}"
