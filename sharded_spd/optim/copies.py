"""Copies and pickles of an optimizer that a projector is attached to.

torch drops step hooks from both: without this, a copy would silently be the plain optimizer.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from typing import Any
from weakref import WeakSet, ref

from torch.optim import Optimizer

_REDUCE = "__reduce_ex__"
_COPIES: WeakSet[Optimizer] = WeakSet()
"""Copies that have not warned yet."""


class CopyWatch:
    """While active, deepcopies and pickles of an optimizer are made by `_reduced`."""

    def __init__(self, attributes: MutableMapping[str, Any]) -> None:
        self._attributes = attributes

    def remove(self) -> None:
        """Let torch make copies again."""
        self._attributes.pop(_REDUCE, None)


def watch_copies(optimizer: Optimizer) -> CopyWatch:
    """Make deepcopies and pickles of `optimizer` warn at their first step that they are plain.

    A shallow `copy.copy` only asks the class and goes unnoticed.
    """
    _COPIES.discard(optimizer)
    weak = ref(optimizer)  # a strong reference in its own attributes would keep it alive

    def reduce(protocol: Any) -> Any:
        return _reduced(weak(), protocol)

    optimizer.__dict__[_REDUCE] = reduce
    return CopyWatch(optimizer.__dict__)


def _reduced(optimizer: Optimizer | None, protocol: Any) -> tuple[Any, ...]:
    kind: Any = type(optimizer)
    make, args, *rest = kind.__reduce_ex__(optimizer, protocol)
    if rest and isinstance(rest[0], dict):
        rest[0] = {key: value for key, value in rest[0].items() if key != _REDUCE}
    return (_make_copy, (make, args), *rest)


def _make_copy(make: Callable[..., Optimizer], args: tuple[Any, ...]) -> Optimizer:
    copy = make(*args)
    copy._optimizer_step_pre_hooks = OrderedDict()  # torch fills in only what is missing
    copy.register_step_pre_hook(_warn)
    watch_copies(copy)
    _COPIES.add(copy)
    return copy


def _warn(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if optimizer in _COPIES:
        _COPIES.discard(optimizer)
        warnings.warn(
            f"this {type(optimizer).__name__} is a copy of one that a projector is attached to, and steps "
            "without it, as the plain base optimizer; attach() to the copy, too, or use AdamSPD, whose "
            "copies take their anchors along",
            stacklevel=2,
        )
