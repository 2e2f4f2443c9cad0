"""The training loop's interface to data: examples by index or in a stream, and the weight of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from typing_extensions import TypeIs

from sharded_spd.finetune.world import World

Batch = Mapping[str, torch.Tensor]
"""The input of a task's model: tensors by name, one row per example."""

E = TypeVar("E")


class ExampleSet(Protocol):
    """Examples that can be fetched by index."""

    @property
    def lazy(self) -> bool:
        """Whether `take` reads files, so that it can fail on one rank alone."""
        ...

    def __len__(self) -> int:
        """The number of examples."""
        ...

    def units(self, indices: torch.Tensor) -> float:
        """How many targets those at `indices` have together: the loss is the mean over targets."""
        ...

    def take(self, indices: torch.Tensor) -> Batch:
        """Those at `indices`, in that order."""
        ...


class ExampleStream(Protocol[E]):
    """A stream of examples, restarted when it ends."""

    def examples(self, seed: int) -> Iterator[E]:
        """Endless, the same on every rank; `seed` sets the order."""
        ...

    def units_of(self, examples: Sequence[E]) -> float:
        """How many targets they have together."""
        ...

    def collate(self, examples: Sequence[E]) -> Batch:
        """Several examples as one batch."""
        ...


TrainSet = ExampleSet | ExampleStream[Any]


def is_stream(data: TrainSet) -> TypeIs[ExampleStream[Any]]:
    """Whether the number of examples is unknown."""
    return not hasattr(data, "take")


@dataclass(frozen=True)
class Splits:
    """The sets of a job. No example is in two of them.

    `retained`: tasks that the checkpoint can do before any training, scored by accuracy next to ID and OOD.
    """

    train: TrainSet
    test: ExampleSet
    ood: Mapping[str, ExampleSet] = field(default_factory=dict)
    validation: ExampleSet | None = None
    pretrain: ExampleSet | None = None
    retained: Mapping[str, ExampleSet] = field(default_factory=dict)


class GlobalBatch(Protocol):
    """The examples of one optimizer step, of which each rank takes its part."""

    count: int
    units: float
    lazy: bool

    def take(self, places: torch.Tensor) -> Batch:
        """The examples at these places of the batch."""
        ...


@dataclass(frozen=True)
class _Indexed:
    data: ExampleSet
    indices: torch.Tensor

    @property
    def count(self) -> int:
        return len(self.indices)

    @property
    def lazy(self) -> bool:
        return self.data.lazy

    @property
    def units(self) -> float:
        return self.data.units(self.indices)

    def take(self, places: torch.Tensor) -> Batch:
        return self.data.take(self.indices[places])


@dataclass(frozen=True)
class _Listed:
    stream: ExampleStream[Any]
    examples: Sequence[Any]
    lazy: bool = False  # they are here already

    @property
    def count(self) -> int:
        return len(self.examples)

    @property
    def units(self) -> float:
        return self.stream.units_of(self.examples)

    def take(self, places: torch.Tensor) -> Batch:
        return self.stream.collate([self.examples[place] for place in places.tolist()])


def global_batches(
    data: TrainSet, *, steps: int, batch_size: int, seed: int, world: World, skip: int
) -> Iterator[Any]:
    """The batches of the steps after `skip`, the same on every rank; a stream is read again up to there.

    Raises:
        ConfigError: on all ranks, where one could not read on in a stream.
    """
    if is_stream(data):
        rows = data.examples(seed)
        for step in range(steps):
            examples = world.agree(lambda: [next(rows) for _ in range(batch_size)])
            if step >= skip:
                yield _Listed(data, examples)
        return
    generator = torch.Generator().manual_seed(seed)
    step = 0
    while step < steps:
        for indices in torch.randperm(len(data), generator=generator).split(batch_size):
            step += 1
            if skip < step <= steps:
                yield _Indexed(data, indices)


def share_of_batch(
    count: int, world: World, *, units: float | None = None, parts: int = 1
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's places in a batch of `count`, in `parts`, and the weight of each in the mean over all.

    Every rank has the same number of places in every part. Engines average over ranks, so a weight is ranks /
    `units` (`count` if None); padding of a short part has weight 0.
    """
    length = -(-count // world.size)
    size = -(-length // parts)
    own = torch.arange(size * parts)
    places = world.rank * length + own
    counts = (own < length) & (places < count)
    weights = counts.to(torch.float32) * (world.size / max(units if units is not None else count, 1))
    places = places.clamp(max=count - 1)
    return [(p, w.to(world.device)) for p, w in zip(places.split(size), weights.split(size), strict=True)]
