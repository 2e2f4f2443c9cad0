"""Detects what a user attaches to (an engine, an optimizer, or a wrapper around one) and its adapter.

A new kind of engine is one more entry of `ENGINES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch.distributed import ProcessGroup
from torch.nn import Module
from torch.optim import Optimizer

from sharded_spd.engines.base import EngineAdapter
from sharded_spd.engines.deepspeed import (
    data_parallel_group,
    deepspeed_adapter,
    is_deepspeed_engine,
    json_block,
    refuse_flat_optimizer,
)
from sharded_spd.engines.model import replicas_of
from sharded_spd.engines.partitioned import ranks_of, share_of
from sharded_spd.engines.plain import ParameterAdapter
from sharded_spd.engines.process_groups import known_groups
from sharded_spd.errors import UnsupportedError


class MakeAdapter(Protocol):
    """Describes an engine; `per_step`: one reduction per engine step."""

    def __call__(self, engine: Any, *, per_step: bool) -> EngineAdapter:
        """Raises UnsupportedError for a setting under which the projection would be wrong."""
        ...


@dataclass(frozen=True, slots=True)
class EngineKind:
    """A kind of engine that owns its optimizer: its detection, our settings in it, its ranks, its adapter."""

    fits: Callable[[Any], bool]
    block: Callable[[Any], Mapping[str, Any] | None]
    ranks: Callable[[Any], ProcessGroup | None]
    adapter: MakeAdapter


ENGINES = (EngineKind(is_deepspeed_engine, json_block, data_parallel_group, deepspeed_adapter),)


def engine_kind(target: Any) -> EngineKind | None:
    """The kind of engine that `target` is; None for an optimizer, a wrapper of one, or anything else."""
    return next((kind for kind in ENGINES if kind.fits(target)), None)


def ranks_around(targets: Sequence[Any], model: Any) -> Sequence[ProcessGroup]:
    """Which ranks attach together, known before anything can fail on one of them; raises nothing."""
    optimizers = [inner for target in targets if isinstance(inner := _innermost(target), Optimizer)]
    params = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    others = [*map(ranks_of, optimizers), replicas_of(params)]
    return known_groups(params, model if isinstance(model, Module) else None, others)


def optimizer_adapter(
    targets: Sequence[Any], model: Module | None, refuse: Callable[[Optimizer], None]
) -> EngineAdapter:
    """The adapter of the optimizers that step inside `targets`; `refuse` may reject each of them.

    Raises:
        UnsupportedError: a target is neither an optimizer nor a wrapper around one.
    """
    if not targets:
        raise UnsupportedError("got an empty sequence of optimizers; wanted at least one")
    found = [_unwrap(target, refuse) for target in targets]
    groups = [group for _, _, group in found if group is not None]
    if len({group.group_name for group in groups}) > 1:
        raise UnsupportedError(
            "got optimizers that partition their parameters over different process groups; wanted one group"
        )
    wholes = [whole for _, whole, _ in found] if groups else []
    return ParameterAdapter(
        [inner for inner, _, _ in found], model, wholes=wholes, everywhere=groups[0] if groups else None
    )


def _innermost(target: Any) -> Any:
    seen = target
    while isinstance(getattr(seen, "optimizer", None), Optimizer):
        seen = seen.optimizer
    return seen


def _unwrap(
    target: Any, refuse: Callable[[Optimizer], None]
) -> tuple[Optimizer, Optimizer, ProcessGroup | None]:
    """The optimizer that steps, the one that partitions its parameters (else itself), and the ranks."""
    seen = _innermost(target)
    if not isinstance(seen, Optimizer):
        raise UnsupportedError(
            f"got {type(target).__name__} to attach to; wanted a torch.optim.Optimizer or several, or a "
            "DeepSpeed engine (not the optimizer that deepspeed.initialize gives)"
        )
    inner, group = share_of(seen) or (seen, None)
    refuse(inner)
    refuse_flat_optimizer(seen)
    return inner, seen, group
