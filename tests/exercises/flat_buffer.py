"""An engine of one's own, in one file: parameters in one flat buffer, of which each rank steps its chunk.

`FlatBuffer` is the user's training loop, which knows nothing of projections. `FlatBufferAdapter` is all that
the package asks for: which elements of which layer this rank's tensor holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from sharded_spd.config import SPDConfig
from sharded_spd.config.resolve import ConfigResolver
from sharded_spd.engines.base import keep
from sharded_spd.engines.flat import chunk, gather_whole, take_piece, tile
from sharded_spd.projection.projector import Projector
from sharded_spd.sharding.layout import BoundShard, Scope, ShardLayout


class FlatBuffer:
    """All of a model's parameters in one buffer; the optimizer holds this rank's chunk of it."""

    def __init__(self, model: nn.Module, group: ProcessGroup) -> None:
        self.model, self.group = model, group
        self.params = dict(model.named_parameters())
        flat = torch.cat([p.detach().reshape(-1) for p in self.params.values()])
        self.window = chunk(flat.numel(), group.rank(), group.size())
        self.chunk = nn.Parameter(flat[slice(*self.window)].clone())

    def backward(self, loss: Tensor) -> None:
        """Leave the gradient's mean over the ranks in this rank's chunk."""
        grads = torch.autograd.grad(loss, list(self.params.values()))
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat, group=self.group)
        self.chunk.grad = (flat / self.group.size())[slice(*self.window)]

    @torch.no_grad()
    def gather(self) -> None:
        """Put what the ranks have stepped into the model."""
        flat = torch.zeros(sum(p.numel() for p in self.params.values()), dtype=self.chunk.dtype)
        flat[slice(*self.window)] = self.chunk
        dist.all_reduce(flat, group=self.group)
        for param, values in zip(
            self.params.values(), flat.split([p.numel() for p in self.params.values()]), strict=True
        ):
            param.copy_(values.view_as(param))


class FlatBufferAdapter:
    """See `EngineAdapter`, which this is one of; in its order."""

    def __init__(self, engine: FlatBuffer, optimizer: Optimizer) -> None:
        self._engine = engine
        self.optimizers: Sequence[Optimizer] = (optimizer,)
        self.names: dict[Tensor, str] = {param: fqn for fqn, param in engine.params.items()}
        self.named = True
        params, group = engine.params, engine.group
        pieces = tile(list(params), [p.numel() for p in params.values()], engine.window)
        self._pieces = {piece.layer: piece for piece in pieces}
        self._split = [group] if group.size() > 1 else []
        self._shapes = {fqn: tuple(p.shape) for fqn, p in params.items()}
        self._shard = BoundShard(engine.chunk, None, pieces, optimizer.param_groups[0], owner=engine.chunk)

    @property
    def agreement_groups(self) -> Sequence[ProcessGroup]:
        """All ranks build the optimizer together."""
        return self._split

    def take_model(self, model: nn.Module | None) -> None:
        """Nothing: the buffer has the model."""

    def keep(self) -> Callable[[], None]:
        """Nothing here changes; the package's helper would undo it."""
        return keep(self)

    def layout(self, model: nn.Module | None = None) -> ShardLayout:
        """Every layer, also where this rank has nothing of it: one group sums them all."""
        fqns = tuple(self._shapes)
        return ShardLayout(fqns, self._shapes, [Scope(group, fqns) for group in self._split], model_fqns=fqns)

    def bind(self, optimizer: Optimizer, *, grads: bool) -> Sequence[BoundShard]:
        """The chunk, now."""
        own = self._engine.chunk
        self._shard.tensor = own
        self._shard.grad = own.grad if grads else None
        self._shard.has_state = bool(optimizer.state.get(own))
        return [self._shard]

    def inner_steps(self, optimizer: Optimizer) -> Sequence[Sequence[BoundShard]]:
        """One call of `step`, of everything."""
        return [self.bind(optimizer, grads=False)]

    def boundary(self, optimizer: Optimizer) -> bool:
        """So that call is always the last one."""
        return True

    def rewrite(self, shards: Sequence[BoundShard]) -> None:
        """Nothing: the model is filled after the step."""

    def tag_param_groups(self, fingerprint: str | None) -> None:
        """Nothing: this engine has no checkpoints of its own."""

    def export(self, fqn: str, local: Tensor) -> Tensor:
        """The whole layer."""
        return gather_whole(local, self._pieces[fqn], self._shapes[fqn], self._split)

    def restore(self, fqn: str, saved: Tensor) -> Tensor:
        """This rank's part of it."""
        return take_piece(saved, self._pieces[fqn])


def attach_flat(engine: FlatBuffer, optimizer: Optimizer, config: SPDConfig) -> Projector:
    """What `attach` does for the engines that it knows."""
    projector = Projector(FlatBufferAdapter(engine, optimizer), ConfigResolver(config), foreign=True)

    def before(stepping: Optimizer, args: Any, kwargs: Any) -> None:
        projector.before_step(stepping)

    def after(stepping: Optimizer, args: Any, kwargs: Any) -> None:
        projector.after_step(stepping)

    projector.add_hooks([optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)])
    return projector
