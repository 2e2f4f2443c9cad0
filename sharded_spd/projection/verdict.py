"""What the ranks told each other in a step, read on the host: who failed, whose settings differ, the guard.

A rank that fails takes part in the step's reduction all the same and says so there, in one number; so no rank
waits for it, and all raise together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_spd.binding.checks import NUM_ROWS, check_first_steps
from sharded_spd.binding.records import Unverified
from sharded_spd.errors import BindingError, ConfigError
from sharded_spd.projection.hostvec import LateCopy
from sharded_spd.projection.layers import ABSENT, Heard
from sharded_spd.sharding.collectives import Failure, raise_first, told_of


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What the guard looks at of one step, reduced.

    `rows` are the guard's, then whether there was a gradient, an overflow, and the learning rate:
    `[num_guard_rows + 3, num_layers]`. `wanted` are the layers with a strength.
    """

    fqns: Sequence[str]
    scopes: Sequence[Sequence[str]]
    rows: Tensor
    wanted: frozenset[str] = frozenset()


def comes_late(numbers: Tensor) -> bool:
    """Whether the host would have to wait for them."""
    return numbers.is_cuda


class Verdict:
    """Read at once where the sums are in host memory; on a GPU when the next step begins, without waiting.

    On a GPU nothing more is told than that a rank failed: it raises by itself, the others when they read.
    """

    def __init__(self, heard: Sequence[Heard], evidence: Sequence[Evidence], unverified: Unverified) -> None:
        self._heard, self._evidence, self._unverified = heard, evidence, unverified
        told = [h.words for h in heard] + [e.rows.reshape(-1) for e in evidence]
        numbers = torch.cat([t.to(told[0].device) for t in told])
        self.late = comes_late(numbers)
        """Whether the numbers are still on their way."""
        self._numbers: Tensor | LateCopy = LateCopy(numbers) if self.late else numbers

    def read(self, failure: Exception | None = None, settings: Mapping[str, Any] | None = None) -> None:
        """Raise what is wrong, on every rank that hears of it.

        Args:
            failure: this rank's own; none if it is that the rank is absent, and so are all.
            settings: this rank's, by name, to tell which differ.

        Raises:
            AnchorError: where a layer had left its anchor before its first step.
            ConfigError: where the settings of the step differ.
            The rank's own exception; on the other ranks one of the same kind that names the failing rank.
        """
        numbers = self._numbers.wait() if isinstance(self._numbers, LateCopy) else self._numbers
        words, rest = numbers[: 2 * len(self._heard)].view(-1, 2).tolist(), numbers[2 * len(self._heard) :]
        if self._all_absent(words):
            return
        wrong = [
            heard
            for heard, (trouble, checksum) in zip(self._heard, words, strict=True)
            if trouble or checksum != heard.group.size() * heard.own
        ]
        if wrong and self.late:
            raise failure or BindingError(
                "another rank failed in the step before this one, or has other settings; its message says why"
            )
        if wrong:
            _raise_together(failure, settings or {}, wrong)
        if failure is not None:
            raise failure
        begin = 0
        for e in self._evidence:
            rows = rest[begin : begin + e.rows.numel()].view(e.rows.shape)
            begin += e.rows.numel()
            guard, (has_grad, found_inf, lr) = rows[:NUM_ROWS], rows[NUM_ROWS:]
            check_first_steps(
                self._unverified,
                e.fqns,
                e.scopes,
                guard,
                has_grad=has_grad,
                found_inf=found_inf,
                lr=lr,
                wanted=e.wanted,
            )

    def _all_absent(self, words: Sequence[Sequence[float]]) -> bool:
        """Whether every rank is; a scope hears of those of the scopes before it, too."""
        expected = ABSENT
        for heard, (trouble, _) in zip(self._heard, words, strict=True):
            expected *= heard.group.size()
            if trouble != expected:
                return False
        return bool(self._heard)


def _raise_together(failure: Exception | None, settings: Mapping[str, Any], wrong: Sequence[Heard]) -> None:
    """Tell each other what is wrong, scope after scope, as word of it came; it is known to the same ranks."""
    failures, known = told_of(failure), {dist.get_rank(): dict(settings)}
    for heard in wrong:
        gathered: list[tuple[list[Failure], dict[int, dict[str, Any]]]] = [([], {})] * heard.group.size()
        dist.all_gather_object(gathered, (failures, known), group=heard.group)
        failures = sorted({entry for entries, _ in gathered for entry in entries})
        known = {rank: theirs for _, found in gathered for rank, theirs in found.items()}
    raise_first(failure, failures)
    raise ConfigError(_difference(known))


def _difference(known: Mapping[int, Mapping[str, Any]]) -> str:
    (first, own), *others = sorted(known.items())
    for rank, theirs in others:
        for name, value in own.items():
            if name in theirs and theirs[name] != value:
                return (
                    f"got {name} {value!r} on rank {first} and {theirs[name]!r} on rank {rank} in one step; "
                    "give all ranks the same settings"
                )
    return f"the settings of a step differ between ranks {sorted(known)}; give all ranks the same"
