"""Which elements of which layer this rank holds, and over which groups to sum: data, no behaviour."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class FlatRange:
    """Elements `[start, start + numel)` of the flattened layer; `numel` stands in the `ShardSlice`."""

    start: int


@dataclass(frozen=True, slots=True)
class Box:
    """The block `[offsets, offsets + sizes)` of the layer, one number per dim."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ShardSlice:
    """Elements `[offset, offset + numel)` of a bound tensor: they are `region` of `layer` (an FQN)."""

    layer: str
    offset: int
    numel: int
    region: FlatRange | Box


@dataclass(slots=True, eq=False)
class BoundShard:
    """One tensor that the base optimizer updates on this rank. An engine may reuse it in every step.

    `slices` has one entry per layer of the tensor on every rank, with `numel` 0 if this rank holds nothing of
    it, so that the layers of a step are the same on all ranks of a scope. `param_group` is the optimizer's
    live group; `has_state`: whether the base optimizer has stepped this tensor before. `origin`, if set, is
    the source of the tensor, in the same order, to take snapshots from: the low-precision weights of a
    float32 master. `owner` is the optimizer's own tensor, which shares its memory with `tensor`; `key` is the
    key of its optimizer state, unless a checkpoint vouches for that.
    """

    tensor: torch.Tensor
    grad: torch.Tensor | None
    slices: tuple[ShardSlice, ...]
    param_group: Mapping[str, Any]
    requires_grad: bool = True
    has_state: bool = False
    origin: torch.Tensor | None = None
    owner: torch.Tensor | None = None
    key: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Scope:
    """One process group and the layers summed over it."""

    group: ProcessGroup
    layers: tuple[str, ...]


class Loader(Protocol):
    """How a model's library reads its files."""

    def rename(self, names: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
        """The model's name of each tensor of a file; and the tensors that are made from others, and how."""
        ...

    def ignores(self, name: str) -> bool:
        """Whether a tensor that the model lacks is left out on purpose."""
        ...

    def loaded_from(self, root: Path) -> bool:
        """Whether the model was loaded from this path."""
        ...


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts about a model's layers beside their shapes, the same on all ranks.

    `ties`: the other names of a tied layer. `tables`: layers with a row per token (or class of tokens), which
    grow and shrink with the vocabulary. `adapters`: how each adapter was initialised; `adapter_parts`: the
    names of their parameters. `loader`: that of the model's library.
    """

    ties: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tables: frozenset[str] = frozenset()
    adapters: Mapping[str, str] = field(default_factory=dict)
    adapter_parts: frozenset[str] = frozenset()
    loader: Loader | None = None


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """All layers of an engine, in model order, identical on all ranks of each scope.

    A layer that is split along two mesh axes is in two scopes, which are summed one after the other.
    `model_fqns` are all the model's names, even of parameters that no optimizer holds; empty without a model.
    `renamed` maps layers' names in the previous layout to new ones. `everywhere` is the group of all ranks if
    some have layers that others lack (experts, optimizers that partition the parameters), else None;
    `elsewhere` are the layers that only others have. `stage`: the model is one stage of a pipeline. `facts`
    are the model's.
    """

    fqns: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    scopes: Sequence[Scope]
    model_fqns: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    everywhere: ProcessGroup | None = None
    elsewhere: tuple[str, ...] = ()
    stage: bool = False
    facts: ModelFacts = field(default_factory=ModelFacts)

    @property
    def order(self) -> tuple[str, ...]:
        """All layers in the model's order, the same on every rank; empty if only the model would know it."""
        if self.stage:
            return ()
        return self.model_fqns or (self.fqns if self.everywhere is None else ())
