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
    """What the base optimizer updates on this rank, now. An engine may hand out the same one in every step.

    `slices` has one entry per layer of the tensor on every rank, with `numel` 0 where this rank holds nothing
    of it, so that the layers of a step are the same on all ranks of a scope. `param_group` is the optimizer's
    live group; `has_state` says whether the base optimizer has stepped this tensor before. `origin` is what
    the tensor was made of, in the same order, where a snapshot is to be taken from that: low-precision
    weights below their float32 master. `owner` is the optimizer's own tensor, whose memory `tensor` shares;
    `key` the one under which it keeps its state, unless that is vouched for.
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
    """How the library that a model is from reads its files."""

    def rename(self, names: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
        """The model's name of each tensor of a file; and those that are made of others, and how."""
        ...

    def ignores(self, name: str) -> bool:
        """Whether a tensor that the model lacks is left out on purpose."""
        ...

    def loaded_from(self, root: Path) -> bool:
        """Whether the model was loaded from this very place."""
        ...


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model tells of its layers beside their shapes, the same on all ranks.

    `ties`: the other names of a layer that is shared. `tables`: layers with a row per token (or class of
    tokens), which grow and shrink with the vocabulary. `adapters`: how each adapter was initialised;
    `adapter_parts`: what their parameters are called. `loader`: of the library that the model is from.
    """

    ties: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tables: frozenset[str] = frozenset()
    adapters: Mapping[str, str] = field(default_factory=dict)
    adapter_parts: frozenset[str] = frozenset()
    loader: Loader | None = None


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """All layers of an engine, in model order, identical on all ranks of each scope.

    A layer that is split along two mesh axes stands in two scopes, which are summed one after the other.
    `model_fqns` are all the model's names, also of what no optimizer holds; empty where no model was given.
    `renamed` tells which layers had another name in the layout before this one. `everywhere` is the group of
    all ranks where some have layers that others have not (experts, optimizers that share the parameters out),
    else None; `elsewhere` are the layers that only others have. `stage`: the model is a part of a pipeline's.
    `facts` are the model's own.
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
        """All layers in the model's order, the same on every rank; empty where only the model could tell."""
        if self.stage:
            return ()
        return self.model_fqns or (self.fqns if self.everywhere is None else ())
