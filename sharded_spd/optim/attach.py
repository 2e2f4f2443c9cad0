"""attach: the projection around any optimizer, through torch's own step hooks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch._compile import _disable_dynamo
from torch.nn import Module
from torch.optim import Optimizer

from sharded_spd.config import SPDConfig, load_config
from sharded_spd.config.resolve import ConfigResolver
from sharded_spd.engines.base import EngineAdapter
from sharded_spd.engines.detect import EngineKind, engine_kind, optimizer_adapter, ranks_around
from sharded_spd.errors import ConfigError, UnsupportedError
from sharded_spd.optim.adam import AdamSPD
from sharded_spd.optim.copies import watch_copies
from sharded_spd.projection.projector import Projector
from sharded_spd.sharding.collectives import agree

_ATTACHED: WeakKeyDictionary[Optimizer, ref[Projector]] = WeakKeyDictionary()


def attach(
    target: Optimizer | Sequence[Optimizer] | Any,
    model: Module | None = None,
    config: SPDConfig | None = None,
) -> Projector:
    """Project the layers that `target` steps toward their anchors, for any optimizer.

    Works through the step hooks of `torch.optim.Optimizer`; the optimizer's type and state do not change. A
    closure is wrapped: the statistics are taken when it returns. A step that calls its base class's step is
    one step. A copy or a pickle of the optimizer is plain, and warns at its first step.

    Args:
        target: an optimizer, a sequence of optimizers over one model, a wrapper around one (accelerate,
            Lightning, ZeroRedundancyOptimizer, fairscale's OSS), or a DeepSpeed engine, after
            `deepspeed.initialize` and before `load_checkpoint`.
        model: names the parameters, as patterns and checkpoints need; an engine knows the names.
        config: the settings; by default the block "sharded_spd" of an engine's JSON, else SPD with lambda 1
            and a snapshot of the weights as they are now.

    Returns:
        The projector; `detach()` removes it again.

    Raises:
        ValueError: a configuration or an anchor does not fit the model.
        TypeError: the target is not an optimizer, or already projects.
    """
    kind = engine_kind(target)
    if kind is not None:
        return _attach_engine(target, kind, config)
    targets = list(target) if isinstance(target, Sequence) else [target]

    def prepare() -> tuple[EngineAdapter, SPDConfig, ConfigResolver]:
        if model is not None and not isinstance(model, Module):
            raise UnsupportedError(
                f"got model={type(model).__name__}; wanted a torch.nn.Module: settings go by name, config=..."
            )
        settings = SPDConfig() if config is None else config
        return optimizer_adapter(targets, model, _refuse), settings, ConfigResolver(settings)

    return _attach(*agree(prepare, ranks_around(targets, model)))


def _attach(adapter: EngineAdapter, config: SPDConfig, resolver: ConfigResolver) -> Projector:
    projector = Projector(
        adapter,
        resolver,
        deferred=config.anchor.source == "deferred"
        or any(_deferred(layer.anchor) for layer in config.layers),
        per_step=config.reduction == "per_step",
        telemetry_every=config.telemetry.every,
        telemetry_path=config.telemetry.path,
        foreign=True,
    )
    for optimizer in adapter.optimizers:
        _ATTACHED[optimizer] = ref(projector)
        pre, post = _hooks(projector)
        projector.add_hooks(
            [
                optimizer.register_step_pre_hook(pre),
                optimizer.register_step_post_hook(post),
                watch_copies(optimizer),
            ]
        )
    return projector


def _attach_engine(engine: Any, kind: EngineKind, config: SPDConfig | None) -> Projector:
    """Attach to an engine; its JSON may hold the settings."""

    def prepare() -> tuple[EngineAdapter, SPDConfig, ConfigResolver]:
        block, settings = kind.block(engine), config
        if settings is None:
            settings = SPDConfig() if block is None else load_config(block)
        elif block is not None and load_config(block) != settings:
            raise ConfigError(
                'got settings both as config= and as the block "sharded_spd" of the DeepSpeed JSON, and they '
                "differ; wanted them in one place"
            )
        adapter = kind.adapter(engine, per_step=settings.reduction == "per_step")
        for optimizer in adapter.optimizers:
            if isinstance(optimizer, AdamSPD):
                if settings != SPDConfig(reduction=settings.reduction):
                    raise ConfigError(
                        "got AdamSPD as the engine's optimizer and settings to attach with; wanted them as "
                        "AdamSPD's own arguments and groups, and attach(engine) alone"
                    )
            else:
                _refuse(optimizer)
        return adapter, settings, ConfigResolver(settings)

    ranks = kind.ranks(engine)
    adapter, settings, resolver = agree(prepare, [] if ranks is None else [ranks])
    optimizer = adapter.optimizers[0]
    if isinstance(optimizer, AdamSPD):
        return optimizer.move_to(adapter, per_step=settings.reduction == "per_step")
    return _attach(adapter, settings, resolver)


def _deferred(anchor: Any) -> bool:
    return anchor is not None and anchor.source == "deferred"


def _refuse(optimizer: Optimizer) -> None:
    """Raise UnsupportedError if `optimizer` already projects."""
    if isinstance(optimizer, AdamSPD):
        raise UnsupportedError(
            "AdamSPD projects by itself; attach to another optimizer, or use AdamSPD alone"
        )
    other = _ATTACHED.get(optimizer, lambda: None)()
    if other is not None and other.attached:
        raise UnsupportedError(
            f"this {type(optimizer).__name__} already has a projector attached; detach() it first"
        )


_HOOKED = Optimizer.profile_hook_step(lambda self: None).__code__
"""The frame that calls a step and its hooks: one per class in a chain of steps that call their base's."""


def _inside_another(optimizer: Optimizer) -> bool:
    """Whether this hook runs in a step that another step of the same optimizer called."""
    frame: FrameType | None = sys._getframe(1)
    depth = 0
    while frame is not None and depth < 2:
        depth += frame.f_code is _HOOKED and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return depth == 2


def _hooks(projector: Projector) -> tuple[Callable[..., Any], Callable[..., None]]:
    @_disable_dynamo
    def pre(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _inside_another(optimizer):
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            projector.before_step(optimizer)
            return None
        wrapped = _wrap(closure, projector, optimizer)
        return (args[0], wrapped, *args[2:]) if len(args) > 1 else args, (
            kwargs if len(args) > 1 else {**kwargs, "closure": wrapped}
        )

    @_disable_dynamo
    def post(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not _inside_another(optimizer):
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
        try:
            loss = closure()
        except Exception as error:
            projector.break_off(optimizer, error)
        projector.before_step(optimizer)
        return loss

    return wrapped
