"""Metrics: per-example sums that ranks can add, or a user's function of all predictions."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from sharded_spd.config.loading import choice
from sharded_spd.errors import ConfigError

IGNORED = -100
"""The label of what is not predicted."""


@dataclass(frozen=True)
class Outcome:
    """A model's output for a batch of `n` examples: logits and labels of classes, or of each token.

    `logits`: `[n, classes]` with `labels` `[n]`, or `[n, length, vocabulary]` with `[n, length]`, of which
    those that are `IGNORED` do not count.
    """

    logits: Tensor
    labels: Tensor

    @property
    def by_token(self) -> bool:
        """Whether there are many labels per example."""
        return self.labels.ndim == 2

    @cached_property
    def predicted(self) -> Tensor:
        """The most likely class of each label, in the labels' shape."""
        return self.logits.argmax(-1)

    @cached_property
    def losses(self) -> Tensor:
        """The cross-entropy of each example, added over its labels, `[n]`."""
        by_class = self.logits.transpose(1, 2) if self.by_token else self.logits
        found = torch.nn.functional.cross_entropy(
            by_class.float(), self.labels, reduction="none", ignore_index=IGNORED
        )
        return found.sum(-1) if self.by_token else found

    @cached_property
    def counts(self) -> Tensor:
        """How many labels of each example count, `[n]`."""
        counted = self.labels != IGNORED
        return counted.sum(-1) if self.by_token else counted.long()


class Metric(Protocol):
    """A number that is made of sums over the examples."""

    @property
    def name(self) -> str:
        """What it is called in the configuration and in the records."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """Whether higher is better."""
        ...

    @property
    def percent(self) -> bool:
        """Whether it is a share, given in percent."""
        ...

    def sums(self, outcome: Outcome) -> Tensor:
        """What each example adds, float64 `[n, k]`."""
        ...

    def value(self, sums: Tensor) -> float:
        """The metric of a set whose sums are `[k]`."""
        ...


@dataclass(frozen=True)
class Accuracy:
    """The share of labels that were predicted."""

    name: str = "accuracy"
    higher_is_better: bool = True
    percent: bool = True

    def sums(self, outcome: Outcome) -> Tensor:
        """Right ones, and all."""
        right = outcome.predicted == outcome.labels
        return torch.stack([right.sum(-1) if outcome.by_token else right, outcome.counts], -1).double()

    def value(self, sums: Tensor) -> float:
        """In percent."""
        return float(100 * sums[0] / sums[1].clamp(min=1))


@dataclass(frozen=True)
class MacroF1:
    """The mean over classes of 2 tp / (predicted + actual); classes that neither has do not count."""

    name: str = "f1"
    higher_is_better: bool = True
    percent: bool = True

    def sums(self, outcome: Outcome) -> Tensor:
        """True positives, predictions, and labels of each class."""
        classes = outcome.logits.shape[-1]
        one_hot = torch.nn.functional.one_hot
        guessed, actual = one_hot(outcome.predicted, classes), one_hot(outcome.labels, classes)
        return torch.cat([guessed * actual, guessed, actual], -1).double()

    def value(self, sums: Tensor) -> float:
        """In percent."""
        right, guessed, actual = sums.chunk(3)
        seen = guessed + actual
        return float(100 * (2 * right / seen.clamp(min=1))[seen > 0].mean())


@dataclass(frozen=True)
class Loss:
    """The mean cross-entropy of a label, or (perplexity) its exponential."""

    name: str = "loss"
    higher_is_better: bool = False
    percent: bool = False

    def sums(self, outcome: Outcome) -> Tensor:
        """Cross-entropy, and labels."""
        return torch.stack([outcome.losses.double(), outcome.counts.double()], -1)

    def value(self, sums: Tensor) -> float:
        """Infinite where the exponential is too large."""
        mean = float(sums[0] / sums[1].clamp(min=1))
        if self.name == "loss":
            return mean
        return math.exp(mean) if mean < 700 else math.inf


@dataclass(frozen=True)
class UserMetric:
    """A function of the user's, by its dotted name: `score(predictions, labels) -> float`, on the CPU.

    `predictions`: logits `[n, classes]`, or the most likely tokens `[n, length]`; `labels`: `[n]`, or
    `[n, length]` with -100 where nothing is predicted. A larger result is a better one.
    """

    name: str
    function: Callable[[Tensor, Tensor], Any]
    higher_is_better: bool = True
    percent: bool = False

    def score(self, predictions: Tensor, labels: Tensor) -> float:
        """The function's result for a whole set.

        Raises:
            ConfigError: where it fails, or returns no number.
        """
        try:
            return float(self.function(predictions, labels))
        except Exception as error:  # whatever the user's function raises
            raise ConfigError(f"metrics: {self.name} failed: {type(error).__name__}: {error}") from error


SUMMED: Mapping[str, Metric] = {m.name: m for m in (Accuracy(), MacroF1(), Loss(), Loss(name="perplexity"))}


def make_metrics(names: Sequence[str], *, known: Sequence[str]) -> list[Metric | UserMetric]:
    """The metrics by name; a name with a dot is a function of the user's.

    Raises:
        ConfigError: a metric that the task does not have, or a function that cannot be imported.
    """
    return [_user_metric(name) if "." in name else _known(name, known) for name in names]


def _known(name: str, known: Sequence[str]) -> Metric:
    if name not in known:
        raise choice("metrics", name, [*known, "package.module.function"])
    return SUMMED[name]


def _user_metric(name: str) -> UserMetric:
    module, _, attribute = name.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"metrics: {name} cannot be imported: {error}; wanted package.module.function on PYTHONPATH"
        ) from None
    if not callable(function):
        raise ConfigError(f"metrics: {name} is a {type(function).__name__}; wanted a function")
    return UserMetric(name, function)
