"""The seam between the projector and an engine: layout only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module
from torch.optim import Optimizer

from sharded_spd.sharding.layout import BoundShard, ShardLayout


class EngineAdapter(Protocol):
    """Which elements of which layer this rank holds, and over which process groups to sum.

    `names` is the model's FQN of each parameter, as far as they are known.
    """

    names: dict[Tensor, str]

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """The optimizers that the engine actually steps."""
        ...

    @property
    def named(self) -> bool:
        """Whether the FQNs are the model's; False if some parameter came unnamed and has a made-up name."""
        ...

    @property
    def agreement_groups(self) -> Sequence[ProcessGroup]:
        """Groups whose ranks run this code together. Raises nothing, and needs no layout."""
        ...

    def take_model(self, model: Module | None) -> None:
        """Set the model that `layout()` inspects; None keeps the current one. Raises nothing."""
        ...

    def keep(self) -> Callable[[], None]:
        """Return a function that restores the adapter's current state, for use after a failed `layout()`."""
        ...

    def layout(self, model: Module | None = None) -> ShardLayout | None:
        """Describe the parameters as they are now; None while they hold no values yet (meta device)."""
        ...

    def bind(self, optimizer: Optimizer, *, grads: bool) -> Sequence[BoundShard]:
        """What `optimizer` updates on this rank, now; `grads=True` only right before its step.

        Raises:
            BindingError: the last `layout()` did not describe a parameter.
        """
        ...

    def inner_steps(self, optimizer: Optimizer) -> Sequence[Sequence[BoundShard]]:
        """What each call of `optimizer.step` within one engine step updates, without gradients."""
        ...

    def boundary(self, optimizer: Optimizer) -> bool:
        """Whether this is the last inner call of an engine step."""
        ...

    def rewrite(self, shards: Sequence[BoundShard]) -> None:
        """Give the engine tensors of earlier inner calls again: they have changed since it took them."""
        ...

    def tag_param_groups(self, fingerprint: str | None) -> None:
        """Store the anchors' fingerprint in the engine's own checkpoints, if possible; None removes it."""
        ...

    def export(self, fqn: str, local: Tensor) -> Tensor:
        """State of this rank's shard, `[numel]`, as a tensor that checkpoint libraries can reshard."""
        ...

    def restore(self, fqn: str, saved: Tensor) -> Tensor:
        """The inverse of `export`: this rank's shard, `[numel]`."""
        ...


def keep(adapter: EngineAdapter) -> Callable[[], None]:
    """Return a function that restores `adapter`'s attributes; for adapters that never change one in place."""
    attributes = dict(vars(adapter))

    def undo() -> None:
        vars(adapter).clear()
        vars(adapter).update(attributes)

    return undo


def made_up_name(group: int, index: int) -> str:
    """The name of a parameter that came without one."""
    return f"param_groups[{group}].params[{index}]"
