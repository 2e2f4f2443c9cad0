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
        """The optimizers that the engine really steps."""
        ...

    @property
    def named(self) -> bool:
        """Whether the FQNs are the model's; False where some parameter came without and has a made-up one."""
        ...

    @property
    def agreement_groups(self) -> Sequence[ProcessGroup]:
        """Groups whose ranks run this code together. Raises nothing, and needs no layout."""
        ...

    def take_model(self, model: Module | None) -> None:
        """Remember the model that `layout()` is to look at; None: as before. Raises nothing."""
        ...

    def keep(self) -> Callable[[], None]:
        """What puts the adapter back as it is now, after a `layout()` that came to nothing."""
        ...

    def layout(self, model: Module | None = None) -> ShardLayout | None:
        """Describe the parameters as they are now; None while they hold no values yet (meta device)."""
        ...

    def bind(self, optimizer: Optimizer, *, grads: bool) -> Sequence[BoundShard]:
        """What `optimizer` updates on this rank, now; `grads=True` only right before its step.

        Raises:
            BindingError: for a parameter that the last `layout()` did not describe.
        """
        ...

    def inner_steps(self, optimizer: Optimizer) -> Sequence[Sequence[BoundShard]]:
        """What each call of `optimizer.step` within one engine step updates, without gradients."""
        ...

    def boundary(self, optimizer: Optimizer) -> bool:
        """Whether this is the last inner call of an engine step."""
        ...

    def rewrite(self, shards: Sequence[BoundShard]) -> None:
        """Hand on tensors of earlier inner calls, which have changed since the engine took them."""
        ...

    def tag_param_groups(self, fingerprint: str | None) -> None:
        """Have the anchors' fingerprint travel in the engine's own checkpoints, if it can; None: no more."""
        ...

    def export(self, fqn: str, local: Tensor) -> Tensor:
        """State of this rank's shard, `[numel]`, as a tensor that checkpoint libraries can reshard."""
        ...

    def restore(self, fqn: str, saved: Tensor) -> Tensor:
        """The inverse of `export`: this rank's shard, `[numel]`."""
        ...


def keep(adapter: EngineAdapter) -> Callable[[], None]:
    """What gives `adapter` the attributes again that it has now; for those who never change one in place."""
    kept = dict(vars(adapter))

    def undo() -> None:
        vars(adapter).clear()
        vars(adapter).update(kept)

    return undo


def made_up_name(group: int, index: int) -> str:
    """The name of a parameter that came without one."""
    return f"param_groups[{group}].params[{index}]"
