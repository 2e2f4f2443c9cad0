"""Parameters that an optimizer holds but the model no longer has: no gradient reaches them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from sharded_spd.engines.flat import FlatPiece
from sharded_spd.engines.model import ModelView, view_model
from sharded_spd.errors import BindingError


def check_still_there(
    optimizer: Optimizer,
    model: Module | None,
    idle: bool,
    before: bool | None,
    parts: Mapping[Tensor, FlatPiece],
) -> None:
    """Check that the model still has the parameters stepped: at the first step, and when all gradients cease.

    Args:
        optimizer: the one about to step.
        model: the current model, if it is known.
        idle: whether the optimizer has no gradient at all.
        before: `idle` of the previous step; None: there was none.
        parts: all bound tensors.

    Raises:
        BindingError: the model has another parameter in a layer's place.
    """
    if model is None or not (before is None or idle):
        return
    now = set(model.parameters())
    lost = {
        param: [piece.layer for piece in parts[param].slices]
        for group in optimizer.param_groups
        for param in group["params"]
        if param in parts and param not in now and param.grad is None
    }
    if lost:  # or gathered, or temporarily taken out of the modules, as FSDP does
        check_replaced(lost, view_model(model), parts, type(optimizer).__name__)


def check_replaced(
    params: Mapping[Tensor, Sequence[str]],
    view: ModelView,
    bound: Collection[Tensor] = (),
    holder: str = "the optimizer",
) -> None:
    """Look for the layers of `params` in the model as it is now.

    A removed layer (an adapter) is no error, nor one with a successor that the optimizer also has (`bound`),
    nor one that is not trained.

    Raises:
        BindingError: the model has another parameter in a layer's place.
    """
    lost = [p for p in params if p.requires_grad and p not in view.names and p not in view.parts]
    if not lost:
        return
    now = {fqn: tensor for tensor, fqn in view.names.items()}
    now |= {piece.layer: tensor for tensor, part in view.parts.items() for piece in part.slices}
    for fqn in (fqn for p in lost for fqn in params[p]):
        successor = now[fqn] if fqn in now else _parametrized(fqn, now)
        if successor is not None and successor.requires_grad and successor not in bound:
            raise BindingError(
                f"layer {fqn!r} of the model is another parameter now than the one that {holder} holds, "
                "which no longer gets a gradient: the model was sharded, resized, moved or parametrized "
                "after the optimizer was built; build the optimizer after that"
            )


def _parametrized(fqn: str, now: Mapping[str, Tensor]) -> Tensor | None:
    path, _, name = fqn.rpartition(".")
    inside = ".".join(filter(None, (path, "parametrizations", name))) + "."
    return next((tensor for other, tensor in now.items() if other.startswith(inside)), None)
