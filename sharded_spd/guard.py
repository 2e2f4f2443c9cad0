"""Is the anchor what it is said to be? Checked at the first step that moves a layer, on all ranks alike.

A snapshot is of the pre-trained weights only if none were loaded after it was taken; a frozen layer is at its
anchor only if it has not been loaded since. Both show in the reduced statistics of the layer's first real
step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sharded_spd.errors import AnchorError
from sharded_spd.stats import Statistic

HAS_STATE, DELTA, DOT, MOVED = range(4)
"""Rows of the guard: ranks where the base has state, |w - w0|^2, <g, w - w0>, ranks where a frozen layer "
"moved."""

GUARD_STATISTICS = (
    Statistic("guard_delta_sq", lambda b: b.delta * b.delta),
    Statistic("guard_grad_dot_delta", lambda b: b.grad * b.delta),
)
"""What is summed for the rows `DELTA` and `DOT`."""


@dataclass(slots=True)
class Found:
    """What the layers that were bound for the first time showed, the same on all ranks but for `worst`.

    `stored`: their fingerprints before a change of dtype. `away`: those that a checkpoint anchors elsewhere
    than at their weights. `lossy`: those whose values a change of dtype changed, on this rank by `worst` at
    most. `pinned`: the layers' fingerprints, also of other ranks', by anchor and the fingerprint it ought to
    have. `strays`: by the anchor's path, the tensors there that go on where the model ends. `notes`: what is
    to be said once.
    """

    stored: dict[str, tuple[int, ...]] = field(default_factory=dict)
    away: list[str] = field(default_factory=list)
    lossy: list[str] = field(default_factory=list)
    worst: float = 0.0
    pinned: dict[tuple[str, str], dict[str, tuple[int, ...]]] = field(default_factory=dict)
    strays: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Unverified:
    """Layers still to be checked, the same on all ranks: fresh snapshots, and frozen layers."""

    fresh: set[str] = field(default_factory=set)
    pending: set[str] = field(default_factory=set)

    def among(self, fqns: Iterable[str]) -> set[str]:
        """Those of `fqns` that are still to be checked."""
        return {fqn for fqn in fqns if fqn in self.fresh or fqn in self.pending}

    def settle(
        self,
        fqns: Sequence[str],
        scopes: Sequence[Sequence[str]],
        guard: Tensor,
        *,
        has_grad: Tensor,
        found_inf: Tensor,
        lr: Tensor,
    ) -> None:
        """Check the layers that step now and strike them off. Waits for the device.

        A step with lr 0 and no gradient, as checkpoint libraries run one, neither proves nor disproves
        anything.

        Raises:
            AnchorError: where a layer had left its anchor before its first step.
        """
        stepping = has_grad > 0
        moves = (lr != 0) | (found_inf > 0) | (guard[DOT] != 0)
        away = stepping & (guard[HAS_STATE] == 0) & (guard[DELTA] > 0) & moves
        real = stepping & (lr != 0) & (found_inf == 0)
        rows = torch.stack([away, guard[MOVED] > 0, real, stepping]).tolist()
        flags = {fqn: [bool(row[i]) for row in rows] for i, fqn in enumerate(fqns)}
        left = [fqn for fqn in fqns if fqn in self.fresh and flags[fqn][0]]
        thawed = [fqn for fqn in fqns if fqn in self.pending and flags[fqn][1]]
        if left:
            raise AnchorError(
                f"{len(left)} layer(s) had left their anchor before the first step, {left[0]!r} for one: "
                "weights were loaded after the snapshot was taken; load the pre-trained weights first and "
                "then build the optimizer, or use anchor='deferred' and call bind() after loading, or "
                "anchor at a checkpoint's path; when resuming, load the projector's (or AdamSPD's) state "
                "too"
            )
        if thawed:
            raise AnchorError(
                f"{len(thawed)} layer(s) were frozen at their anchor when it was bound and have other "
                f"weights at their first gradient, {thawed[0]!r} for one: weights were loaded in between; "
                "anchor at a checkpoint's path, or let the layers require gradients when the anchor is "
                "bound"
            )
        scoped = {fqn for scope in scopes for fqn in scope}
        for members in [*scopes, [fqn for fqn in fqns if fqn not in scoped]]:
            if any(flags[fqn][2] for fqn in members if fqn in self.fresh):
                self.fresh -= set(members)
        self.pending -= {fqn for fqn in fqns if flags[fqn][3]}
