"""Parameters that an optimizer holds and the model has no more: no gradient reaches them, nothing is trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from sharded_spd.engines.model import ModelView
from sharded_spd.errors import BindingError


def check_replaced(
    params: Mapping[Tensor, Sequence[str]], view: ModelView, bound: Collection[Tensor], optimizer: str
) -> None:
    """Look for the layers of `params` in the model as it is now.

    One that is gone (an adapter that was taken out) is no fault, nor one whose successor the optimizer has
    too (`bound`), or that is not trained.

    Raises:
        BindingError: for a layer in whose place the model has another parameter.
    """
    lost = {p: layers for p, layers in params.items() if p not in view.names and p not in view.parts}
    if not lost:
        return
    now = {fqn: tensor for tensor, fqn in view.names.items()}
    now |= {piece.layer: tensor for tensor, part in view.parts.items() for piece in part.slices}
    for layers in lost.values():
        for fqn in layers:
            successor = now[fqn] if fqn in now else _parametrized(fqn, now)
            if successor is not None and successor.requires_grad and successor not in bound:
                raise BindingError(
                    f"layer {fqn!r} of the model is another parameter now than the one that {optimizer} holds, "
                    "which gets no gradient any more: the model was sharded, resized, moved or parametrized "
                    "after the optimizer was built; build the optimizer after that"
                )


def _parametrized(fqn: str, now: Mapping[str, Tensor]) -> Tensor | None:
    path, _, name = fqn.rpartition(".")
    inside = ".".join(filter(None, (path, "parametrizations", name))) + "."
    return next((tensor for other, tensor in now.items() if other.startswith(inside)), None)
