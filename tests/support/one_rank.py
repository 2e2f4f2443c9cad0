"""What goes wrong on one rank alone, and a check that all ranks hear of it at once and stay in step."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_spd import errors
from sharded_spd.rules import LayerInfo, Options, Rule, RuleSpec, Stats
from sharded_spd.rules.statistics import DELTA_SQ, GRAD_DOT_DELTA, Block, Statistic
from sharded_spd.sharding.layout import ShardSlice
from tests.support.engines import Engine

LIMIT = 6.0
"""Seconds in which every rank has to have raised."""

_SHARED = (
    errors.AnchorError,
    errors.BindingError,
    errors.CheckpointError,
    errors.ConfigError,
    errors.UnsupportedError,
    OSError,
    TypeError,
    ValueError,
)
"""What all ranks raise alike; of another class the others make a RuntimeError."""

_BROKEN: set[str] = set()


def stumble(part: str) -> None:
    """Raise what no rank but this one can foresee, while `part` is broken here."""
    if part in _BROKEN:
        raise OverflowError(f"{part} stumbled")


@contextmanager
def broken(part: str, here: bool) -> Iterator[None]:
    """A part of what the user gave that raises, if it is `here`."""
    if here:
        _BROKEN.add(part)
    try:
        yield
    finally:
        _BROKEN.discard(part)


@dataclass(frozen=True, slots=True)
class Values:
    """A slice that is read in chunks."""

    values: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of every chunk."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Of every chunk."""
        return self.values.device

    def numel(self) -> int:
        """How many there are."""
        return self.values.numel()

    def __getitem__(self, cut: slice, /) -> Tensor:
        """The values of that chunk."""
        stumble("values")
        return self.values[cut]


class Store:
    """A user's store of zeros, which may refuse, stumble, or give too few."""

    source = "a store"

    def problems(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """None, unless it stumbles."""
        stumble("problems")
        return []

    def fetch(self, piece: ShardSlice) -> Values:
        """As many values as asked for, or one more."""
        stumble("fetch")
        return Values(torch.zeros(piece.numel + int("numel" in _BROKEN), dtype=torch.float64))


def _dot(block: Block) -> Tensor:
    stumble("term")
    return block.grad * block.delta


def _square(block: Block) -> Tensor:
    stumble("term after")
    return block.delta * block.delta


_DOT, _SQUARE = Statistic("own_dot", _dot), Statistic("own_square", _square)


@dataclass(frozen=True, slots=True)
class Pulls(Rule):
    """A user's rule after the step, each part of which may stumble; `share` is its option."""

    share: float = 0.1
    name: ClassVar[str] = "one_rank_pulls"
    spec: ClassVar[RuleSpec] = RuleSpec(
        before=(_DOT,), after=(_SQUARE,), layer_state=("calls",), shard_state=("seen",)
    )

    def prepare(self, layers: Sequence[LayerInfo]) -> Mapping[str, Tensor]:
        """Zeros."""
        stumble("prepare")
        return {"calls": torch.zeros(len(layers), dtype=torch.float64)}

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """The same for all layers."""
        stumble("pull")
        state["calls"] = state["calls"] + 1
        return torch.full_like(options.lr, self.share)

    def next_shard_state(self, block: Block, stats: Stats, rows: Any) -> Mapping[str, Tensor]:
        """The deviation."""
        stumble("next_shard_state")
        return {"seen": block.delta}

    def telemetry(self, stats: Stats, s: Tensor) -> Mapping[str, Tensor]:
        """Nothing."""
        stumble("telemetry")
        return {}


@dataclass(frozen=True, slots=True)
class Decays(Rule):
    """The same before the step, as decoupled weight decay."""

    name: ClassVar[str] = "one_rank_decays"
    spec: ClassVar[RuleSpec] = RuleSpec(when="before", anchored=False)

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """A little."""
        stumble("pull")
        return torch.full_like(options.lr, 0.01)


@dataclass(frozen=True, slots=True)
class Edits(Rule):
    """The same on gradients."""

    name: ClassVar[str] = "one_rank_edits"
    spec: ClassVar[RuleSpec] = RuleSpec(before=(GRAD_DOT_DELTA, DELTA_SQ, _DOT), edits_grad=True)

    def plan_edit(
        self, stats: Stats, state: MutableMapping[str, Tensor], options: Options
    ) -> Mapping[str, Tensor]:
        """A tenth."""
        stumble("plan_edit")
        return {"amount": torch.full_like(options.lr, 0.1)}

    def edit_grad(self, block: Block, plan: Mapping[str, Tensor]) -> Tensor:
        """A little less."""
        stumble("edit_grad")
        return block.grad - plan["amount"] * block.delta

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """Nothing."""
        return torch.zeros_like(options.lr)


@dataclass
class Trouble:
    """One case on one engine: what goes wrong on rank `odd` alone, and what all ranks have found so far.

    `ranks` have to hear of it; all where it is empty.
    """

    engine: Engine
    name: str
    odd: int
    ranks: tuple[int, ...] = ()
    num_reports: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def here(self) -> bool:
        """Whether this is the rank."""
        return self.engine.rank == self.odd

    def either(self, bad: Any, good: Any) -> Any:
        """`bad` on that rank, `good` on the others."""
        return bad if self.here else good

    def told(self, action: Callable[[], object], *patterns: str, differs: bool = False) -> None:
        """`action` raises on every rank that has to hear: the rank's own error, the others one that names it.

        Where it `differs`, no rank is wrong by itself: all raise the same kind, of layers that they share.
        Beyond the limit it is a hang, which ends the case; the rest is kept as `faults`, alike on all ranks.
        """
        since, kind, text = time.monotonic(), "", ""
        try:
            action()
        except Exception as error:
            shared = type(error) in _SHARED
            kind, text = type(error).__name__ if shared else f"{type(error).__name__}*", str(error)
        found = self._reports([kind, text, time.monotonic() - since])
        ranks = self.ranks or tuple(range(self.engine.world))
        own = found[self.odd]
        for rank, (kind, text, took) in enumerate(found):
            if rank not in ranks:
                self._check(not kind, f"rank {rank} raised {kind}: {text}")
                continue
            self._check(bool(kind), f"rank {rank} raised nothing; rank {self.odd}: {own}")
            if not kind:
                continue
            self._check(took < LIMIT, f"rank {rank} took {took:.1f} s")
            for pattern in patterns:
                self._check(
                    bool(re.search(pattern, text, re.DOTALL)), f"rank {rank}: {pattern!r} in {text!r}"
                )
            if rank != self.odd:
                wanted = "RuntimeError*" if own[0].endswith("*") else own[0]
                self._check(kind == wanted, f"rank {rank} raised {kind}, rank {self.odd} {own[0]}: {text}")
                said = differs or (f"rank {self.odd}" in text and own[1] in text)
                self._check(said, f"rank {rank} said {text!r}, rank {self.odd} {own[1]!r}")
        self.in_step()

    def _check(self, right: bool, fault: str) -> None:
        if not right:
            self.faults.append(fault)

    def _reports(self, own: list[Any]) -> list[Any]:
        """What all ranks report, through files: collectives may be what is out of step."""
        self.num_reports += 1
        paths = [
            self.engine.scratch / f"{self.name}{self.num_reports}-{rank}.json"
            for rank in range(self.engine.world)
        ]
        path = paths[self.engine.rank]
        path.with_suffix(".partial").write_text(json.dumps(own))
        path.with_suffix(".partial").rename(path)
        until = time.monotonic() + 2 * LIMIT
        while missing := [rank for rank, path in enumerate(paths) if not path.exists()]:
            assert time.monotonic() < until, f"ranks {missing} wait; rank {self.engine.rank} got {own}"
            time.sleep(0.002)
        return [json.loads(path.read_text()) for path in paths]

    def in_step(self) -> None:
        """The next collectives of all ranks are the same."""
        dist.barrier()
        total = torch.tensor([float(self.engine.rank)])
        dist.all_reduce(total)
        world = self.engine.world
        assert float(total) == world * (world - 1) / 2, f"out of step: {float(total)}"

    def same(self, what: str, value: object) -> None:
        """A value that is equal on all ranks."""
        found: list[object] = [None] * self.engine.world
        dist.all_gather_object(found, value)
        self._check(all(other == found[0] for other in found), f"{what} differ between ranks: {found}")
