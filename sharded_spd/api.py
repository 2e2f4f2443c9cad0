"""attach: the projection around any optimizer, through torch's own step hooks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch.distributed import ProcessGroup
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from sharded_spd.adam import AdamSPD
from sharded_spd.config import SPDConfig, load_config
from sharded_spd.engines.base import EngineAdapter
from sharded_spd.engines.deepspeed import deepspeed_adapter, is_deepspeed_engine, json_block
from sharded_spd.engines.partitioned import share_of
from sharded_spd.engines.plain import ParameterAdapter
from sharded_spd.errors import ConfigError, UnsupportedError
from sharded_spd.projector import Projector
from sharded_spd.sources import ConfigResolver

_ATTACHED: WeakKeyDictionary[Optimizer, ref[Projector]] = WeakKeyDictionary()


def attach(
    target: Optimizer | Sequence[Optimizer] | Any,
    model: Module | None = None,
    config: SPDConfig | None = None,
) -> Projector:
    """Project the layers that `target` steps toward their anchors, whatever optimizer it is.

    Works through the step hooks of `torch.optim.Optimizer`; the optimizer's type and state are left alone. A
    closure is wrapped: the statistics are taken when it returns.

    Args:
        target: an optimizer, a sequence of optimizers over one model, a wrapper around one (accelerate,
            Lightning, ZeroRedundancyOptimizer, fairscale's OSS), or a DeepSpeed engine, after
            `deepspeed.initialize` and before `load_checkpoint`.
        model: gives the parameters their names, which patterns and checkpoints need; an engine knows them.
        config: the settings; by default the block "sharded_spd" of an engine's JSON, else SPD with lambda 1
            and a snapshot of the weights as they are now.

    Returns:
        The projector; `detach()` takes it off again.

    Raises:
        ValueError: for a configuration or an anchor that does not fit the model.
        TypeError: for a target that is no optimizer, or one that projects already.
    """
    if model is not None and not isinstance(model, Module):
        raise UnsupportedError(
            f"got model={type(model).__name__}; wanted a torch.nn.Module: settings go by name, config=..."
        )
    if is_deepspeed_engine(target):
        return _attach_engine(target, config)
    found = [_unwrap(t) for t in (target if isinstance(target, Sequence) else [target])]
    if not found:
        raise UnsupportedError("got an empty sequence of optimizers; wanted at least one")
    optimizers = [optimizer for optimizer, _, _ in found]
    for optimizer in optimizers:
        if isinstance(optimizer, AdamSPD):
            raise UnsupportedError(
                "AdamSPD projects by itself; attach to another optimizer, or use AdamSPD alone"
            )
    groups = [group for _, _, group in found if group is not None]
    if len({group.group_name for group in groups}) > 1:
        raise UnsupportedError(
            "got optimizers that share their parameters out over different process groups; wanted one group"
        )
    wholes = [whole for _, whole, _ in found] if groups else []
    adapter = ParameterAdapter(optimizers, model, wholes=wholes, everywhere=groups[0] if groups else None)
    return _attach(adapter, SPDConfig() if config is None else config)


def _attach(adapter: EngineAdapter, config: SPDConfig) -> Projector:
    projector = Projector(
        adapter,
        ConfigResolver(config),
        deferred=config.anchor.source == "deferred"
        or any(_deferred(layer.anchor) for layer in config.layers),
        together=config.defer,
        telemetry_every=config.telemetry.every,
        telemetry_path=config.telemetry.path,
    )
    for optimizer in adapter.optimizers:
        _ATTACHED[optimizer] = ref(projector)
        pre, post = _hooks(projector)
        projector.add_hooks([optimizer.register_step_pre_hook(pre), optimizer.register_step_post_hook(post)])
    return projector


def _attach_engine(engine: Any, config: SPDConfig | None) -> Projector:
    """To a DeepSpeed engine; its JSON may hold the settings."""
    block = json_block(engine)
    if config is None:
        config = SPDConfig() if block is None else load_config(block)
    elif block is not None and load_config(block) != config:
        raise ConfigError(
            'got settings both as config= and as the block "sharded_spd" of the DeepSpeed JSON, and they '
            "differ; wanted them in one place"
        )
    adapter = deepspeed_adapter(engine, defer=config.defer)
    for optimizer in adapter.optimizers:
        if isinstance(optimizer, AdamSPD):
            if config != SPDConfig(defer=config.defer):
                raise ConfigError(
                    "got AdamSPD as the engine's optimizer and settings to attach with; wanted them as "
                    "AdamSPD's own arguments and groups, and attach(engine) alone"
                )
            return optimizer.move_to(adapter, together=config.defer)
        _check_free(optimizer)
    return _attach(adapter, config)


def _deferred(anchor: Any) -> bool:
    return anchor is not None and anchor.source == "deferred"


def _unwrap(target: Any) -> tuple[Optimizer, Optimizer, ProcessGroup | None]:
    """The optimizer that steps, what shares its parameters out over the ranks (else itself), and these."""
    seen = target
    while isinstance(getattr(seen, "optimizer", None), Optimizer):
        seen = seen.optimizer
    if not isinstance(seen, Optimizer):
        raise UnsupportedError(
            f"got {type(target).__name__} to attach to; wanted a torch.optim.Optimizer or several, or a "
            "DeepSpeed engine (not the optimizer that deepspeed.initialize gives)"
        )
    inner, group = share_of(seen) or (seen, None)
    _check_free(inner)
    _check_no_flat(seen)
    return inner, seen, group


def _check_free(optimizer: Optimizer) -> None:
    other = _ATTACHED.get(optimizer, lambda: None)()
    if other is not None and other.attached:
        raise UnsupportedError(
            f"this {type(optimizer).__name__} is attached to already; detach() its projector first"
        )


def _check_no_flat(optimizer: Optimizer) -> None:
    """DeepSpeed's flats are no parameters: taken for layers, they would be pulled as one."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    flat = any(p.ndim == 1 and not isinstance(p, Parameter) for p in params)
    if "deepspeed" in sys.modules and (flat or not params):
        raise UnsupportedError(
            f"this {type(optimizer).__name__} holds no parameters of a model, as one inside of a DeepSpeed "
            "engine; wanted the engine: attach(engine)"
        )


def _hooks(projector: Projector) -> tuple[Callable[..., Any], Callable[..., None]]:
    def pre(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            projector.before_step(optimizer)
            return None
        wrapped = _wrap(closure, projector, optimizer)
        return (args[0], wrapped, *args[2:]) if len(args) > 1 else args, (
            kwargs if len(args) > 1 else {**kwargs, "closure": wrapped}
        )

    def post(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        projector.after_step(optimizer)

    return pre, post


def _wrap(closure: Callable[[], Any], projector: Projector, optimizer: Optimizer) -> Callable[[], Any]:
    calls = 0

    def wrapped() -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise UnsupportedError(
                f"{type(optimizer).__name__} evaluated its closure more than once in one step; the "
                "projection needs one gradient per step: use an optimizer that evaluates it once"
            )
        loss = closure()
        projector.before_step(optimizer)
        return loss

    return wrapped
