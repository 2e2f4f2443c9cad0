"""What goes over the wire in a block of code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """Records each collective of the block with the number of elements that it sends.

    `direct` are calls of torch.distributed, which is what the package issues; `functional` are those that
    DTensor issues, as when a Partial gradient is redistributed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.direct: list[tuple[str, int]] = []
        self.functional: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        name = func._schema.name if hasattr(func, "_schema") else str(func)
        space, _, op = name.partition("::")
        if space == "c10d":
            self.direct.append((op, _numel(args)))
        elif space in ("_c10d_functional", "c10d_functional") and not op.startswith(("wait", "_wrap")):
            self.functional.append((op, _numel(args)))
        return func(*args, **(kwargs or {}))


def _numel(args: Any) -> int:
    flat = torch.utils._pytree.tree_leaves(args)
    return sum(value.numel() for value in flat if isinstance(value, Tensor))
