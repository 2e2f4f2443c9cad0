"""attach: the projection around any optimizer, through torch's own step hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch.nn import Module
from torch.optim import Optimizer

from sharded_spd.adam import AdamSPD
from sharded_spd.config import SPDConfig
from sharded_spd.engines.plain import ParameterAdapter
from sharded_spd.errors import UnsupportedError
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
    closure
    is wrapped: the statistics are taken when it returns.

    Args:
        target: an optimizer, a sequence of optimizers over one model, or a wrapper around one (accelerate,
            Lightning).
        model: gives the parameters their names, which patterns and checkpoints need.
        config: the settings; by default SPD with lambda 1 and a snapshot of the weights as they are now.

    Returns:
        The projector; `detach()` takes it off again.

    Raises:
        ValueError: for a configuration or an anchor that does not fit the model.
        TypeError: for a target that is no optimizer, or one that projects already.
    """
    optimizers = [_unwrap(t) for t in (target if isinstance(target, Sequence) else [target])]
    if not optimizers:
        raise UnsupportedError("got an empty sequence of optimizers; wanted at least one")
    config = SPDConfig() if config is None else config
    projector = Projector(
        ParameterAdapter(optimizers, model),
        ConfigResolver(config),
        deferred=config.anchor.source == "deferred"
        or any(_deferred(layer.anchor) for layer in config.layers),
        telemetry_every=config.telemetry.every,
        telemetry_path=config.telemetry.path,
    )
    for optimizer in optimizers:
        _ATTACHED[optimizer] = ref(projector)
        pre, post = _hooks(projector)
        projector.add_hooks([optimizer.register_step_pre_hook(pre), optimizer.register_step_post_hook(post)])
    return projector


def _deferred(anchor: Any) -> bool:
    return anchor is not None and anchor.source == "deferred"


def _unwrap(target: Any) -> Optimizer:
    """The optimizer inside accelerate's and Lightning's wrappers."""
    seen = target
    while isinstance(getattr(seen, "optimizer", None), Optimizer):
        seen = seen.optimizer
    if not isinstance(seen, Optimizer):
        raise UnsupportedError(
            f"got {type(target).__name__} to attach to; wanted a torch.optim.Optimizer or several"
        )
    other = _ATTACHED.get(seen, lambda: None)()
    if other is not None and other.attached:
        raise UnsupportedError(
            f"this {type(seen).__name__} is attached to already; detach() its projector first"
        )
    if isinstance(seen, AdamSPD):
        raise UnsupportedError(
            "AdamSPD projects by itself; attach to another optimizer, or use AdamSPD alone"
        )
    return seen


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
