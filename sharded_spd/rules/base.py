"""The interface of rules: the statistics that a rule needs, and how they become the pull s once reduced.

A rule sees its layers as columns `[num_layers]` (their rows, concatenated, as `[num_rows]`),
already summed over all ranks. It knows no engine and calls no collective.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from sharded_spd.rules.statistics import Block, Statistic


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """What a rule may know about a layer in advance.

    `order` names all layers in the model's order, the same on every rank; empty if no rank knows it.
    """

    fqn: str
    shape: tuple[int, ...]
    order: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleSpec:
    """What the projector must provide for a rule; what a rule does not declare costs nothing.

    Attributes:
        before: statistics summed before the base step (`Block.grad` may be read).
        after: statistics summed after the base step (`Block.delta` is then w~ - w0).
        granularity: the shape of s: a number per layer, per row, or (from `pull_elements`) per element.
        when: whether the pull comes after the base step, or before it, as decoupled weight decay does.
        anchored: False for a rule that pulls toward zero and never reads the anchor.
        pulls: False for a rule that leaves the base optimizer alone.
        keeps_w: keep a copy of w over the base step (`Block.kept`, `Block.update`, `Block.kept_delta`).
        pulls_kept: granularity "element", with `keeps_w`: the pull is w <- w~ - s * (w - w0).
        decays: for a rule without a strength: the param group's weight_decay is AdamW's decay, applied before
            the base step. If a configuration sets lambda (`attach`), the base has its own decay.
        edits_grad: reduce `before` ahead of the base step and let `edit_grad` change the gradient.
        layer_state: names of replicated float64 state, one number per layer, made by `prepare`.
        shard_state: names of state shaped like the weights, kept per shard, zero at first.
    """

    before: tuple[Statistic, ...] = ()
    after: tuple[Statistic, ...] = ()
    granularity: Literal["layer", "row", "element"] = "layer"
    when: Literal["before", "after"] = "after"
    anchored: bool = True
    pulls: bool = True
    keeps_w: bool = False
    pulls_kept: bool = False
    decays: bool = False
    edits_grad: bool = False
    layer_state: tuple[str, ...] = ()
    shard_state: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Scalars of the layers' param groups in this step, float64 `[num_layers]`."""

    lr: Tensor
    weight_decay: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """The reduced statistics of a rule's layers: `[num_layers]`, or `[num_rows]` for statistics per row."""

    before: Mapping[Statistic, Tensor]
    after: Mapping[Statistic, Tensor] = field(default_factory=dict)
    row_lengths: Tensor

    def to_rows(self, per_layer: Tensor) -> Tensor:
        """Repeat each layer's number for each of its rows: `[num_layers]` -> `[num_rows]`."""
        return torch.repeat_interleave(per_layer, self.row_lengths, output_size=self._num_rows)

    def over_rows(self, per_row: Tensor, how: Literal["sum", "max"]) -> Tensor:
        """Sum or maximum over each layer's rows: `[num_rows]` -> `[num_layers]`."""
        return torch.segment_reduce(per_row, how, lengths=self.row_lengths, unsafe=True)

    @property
    def _num_rows(self) -> int:
        rows = [x.numel() for s, x in {**self.before, **self.after}.items() if s.per == "row"]
        if not rows:
            raise RuntimeError("a rule that works per row must declare a statistic per row")
        return rows[0]


RowValues = Callable[[Tensor], Tensor]
"""Expands a rule's per-row values `[num_rows]` to the elements of the current block."""


class Rule(Protocol):
    """How reduced statistics become the pull s: w <- w~ - s * (w~ - w0).

    Implementations are small frozen dataclasses; what changes over time lives in the projector's state.
    """

    name: ClassVar[str]
    spec: ClassVar[RuleSpec]

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Accept, with a warning, the previous release's name `shrink` for `pull`."""
        super().__init_subclass__(**kwargs)
        for old, new in (("shrink", "pull"), ("shrink_elements", "pull_elements")):
            if old in vars(cls) and new not in vars(cls):
                warnings.warn(
                    f"{cls.__name__}.{old} is called {new} now; the old name goes with the next release",
                    FutureWarning,
                    stacklevel=2,
                )
                setattr(cls, new, vars(cls)[old])

    def prepare(self, layers: Sequence[LayerInfo]) -> Mapping[str, Tensor]:
        """Initial values of `spec.layer_state`, float64 `[num_layers]` each, on the CPU."""
        return {name: torch.zeros(len(layers), dtype=torch.float64) for name in self.spec.layer_state}

    def pull(self, stats: Stats, state: MutableMapping[str, Tensor], options: Options) -> Tensor:
        """S, float64 `[num_layers]` or `[num_rows]`; new state goes into `state`; never in place.

        A result that is not finite, or of a layer that does not step (no gradient, lr 0, skipped by a
        gradient scaler), is replaced by 0, and its state stays unchanged.
        """
        ...

    def pull_elements(self, block: Block, lr: Tensor, weight_decay: Tensor) -> Tensor:
        """S of each element of `block` (granularity "element"); lr and lambda are the layer's own, 0-d."""
        raise NotImplementedError(
            f"rule {self.name!r} has granularity 'element' but defines no pull_elements"
        )

    def plan_edit(
        self, stats: Stats, state: MutableMapping[str, Tensor], options: Options
    ) -> Mapping[str, Tensor]:
        """Coefficients `[num_layers]` for `edit_grad`, from the statistics before the step."""
        return {}

    def edit_grad(self, block: Block, plan: Mapping[str, Tensor]) -> Tensor:
        """The gradient for the base optimizer, float64; `plan` has this layer's coefficients, 0-d."""
        raise NotImplementedError(f"rule {self.name!r} declares edits_grad but defines no edit_grad")

    def next_shard_state(self, block: Block, stats: Stats, rows: RowValues) -> Mapping[str, Tensor]:
        """New values of `spec.shard_state` for `block`; its weight is still w~. Called before the pull."""
        raise NotImplementedError(f"rule {self.name!r} declares shard_state but defines no next_shard_state")

    def telemetry(self, stats: Stats, s: Tensor) -> Mapping[str, Tensor]:
        """Numbers per layer worth logging, `[num_layers]` each, by name."""
        return {}
