"""Rules and an anchor of a user's own that raise where a test says so, on the rank that it says."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sharded_spd.layout import ShardSlice
from sharded_spd.rules import CWD, LayerInfo, Options, RuleSpec, Stats
from sharded_spd.rules.base import RowValues
from sharded_spd.stats import GRAD_DOT_DELTA, ROW_L1, Block, Statistic
from tests.support.toy_rules import GRAD_DOT_PREVIOUS, RowBall, TurnBack

if TYPE_CHECKING:
    from collections.abc import Iterator

_BROKEN: set[str] = set()


class Broken(ArithmeticError):
    """What user's code raises here: no class that the package knows."""


@contextmanager
def broken(*places: str) -> Iterator[None]:
    """Code of these places raises inside."""
    _BROKEN.update(places)
    try:
        yield
    finally:
        _BROKEN.difference_update(places)


def _may_break(place: str) -> None:
    if place in _BROKEN:
        raise Broken(f"{place} is broken")


def _term(block: Block) -> Tensor:
    _may_break("statistic")
    return block.delta


_STATISTIC = Statistic("may_break", _term)


@dataclass(frozen=True)
class BreakingRows(RowBall):
    """`RowBall`, a rule with state of both kinds and sums before and after the step."""

    name: ClassVar[str] = "breaking_rows"
    spec: ClassVar[RuleSpec] = RuleSpec(
        before=(GRAD_DOT_PREVIOUS,),
        after=(ROW_L1, _STATISTIC),
        granularity="row",
        layer_state=("radius",),
        shard_state=("previous",),
    )

    def prepare(self, layers: Sequence[LayerInfo]) -> Mapping[str, Tensor]:
        """Zero."""
        _may_break("prepare")
        return {"radius": torch.zeros(len(layers), dtype=torch.float64)}

    def shrink(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """As `RowBall`."""
        _may_break("shrink")
        return super().shrink(stats, state, options)

    def next_shard_state(self, block: Block, stats: Stats, rows: RowValues) -> Mapping[str, Tensor]:
        """As `RowBall`."""
        _may_break("next_shard_state")
        return super().next_shard_state(block, stats, rows)


@dataclass(frozen=True)
class BreakingEdit(TurnBack):
    """`TurnBack`, a rule that edits the gradient."""

    name: ClassVar[str] = "breaking_edit"
    spec: ClassVar[RuleSpec] = RuleSpec(
        before=(*TurnBack.spec.before, _STATISTIC), edits_grad=True, layer_state=("share",)
    )

    def plan_edit(
        self, stats: Stats, state: MutableMapping[str, Tensor], options: Options
    ) -> Mapping[str, Tensor]:
        """As `TurnBack`."""
        _may_break("plan_edit")
        return super().plan_edit(stats, state, options)

    def edit_grad(self, block: Block, plan: Mapping[str, Tensor]) -> Tensor:
        """As `TurnBack`."""
        _may_break("edit_grad")
        return super().edit_grad(block, plan)


@dataclass(frozen=True)
class BreakingElements(CWD):
    """`CWD`, a rule with a pull for each element, beside a sum."""

    name: ClassVar[str] = "breaking_elements"
    spec: ClassVar[RuleSpec] = RuleSpec(
        before=(GRAD_DOT_DELTA,), granularity="element", keeps_w=True, pulls_kept=True
    )

    def shrink_elements(self, block: Block, lr: Tensor, weight_decay: Tensor) -> Tensor:
        """As `CWD`."""
        _may_break("shrink_elements")
        return super().shrink_elements(block, lr, weight_decay)


class _Values:
    """Values that are read in chunks."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self.dtype, self.device = values.dtype, values.device

    def numel(self) -> int:
        return self._values.numel()

    def __getitem__(self, cut: slice) -> Tensor:
        _may_break("chunk")
        return self._values[cut]


class BreakingStore:
    """Each layer's anchor is one everywhere."""

    source = "a store of the user's own"

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self._dtype = dtype

    def problems(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """None."""
        _may_break("problems")
        return ["the store has no such layer"] if "problem" in _BROKEN else []

    def fetch(self, piece: ShardSlice) -> Any:
        """Ones."""
        _may_break("fetch")
        return _Values(torch.ones(piece.numel + ("numel" in _BROKEN), dtype=self._dtype))
