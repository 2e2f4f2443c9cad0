"""Is the anchor what it is said to be? Checked at the first step that moves a layer, on all ranks alike.

A snapshot is of the pre-trained weights only if none were loaded after it was taken; a frozen layer is at its
anchor only if it has not been loaded since. Both show in the reduced statistics of the layer's first real
step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharded_spd.engines.dtensor import local_tensor
from sharded_spd.errors import AnchorError
from sharded_spd.rules.statistics import Statistic
from sharded_spd.sharding.layout import BoundShard

HAS_STATE, DELTA, DOT, MOVED, TRAINED = range(5)
"""Rows of the guard: ranks where the base has state, |w - w0|^2, <g, w - w0>, ranks where a layer moved whose
anchor was not held yet, ranks where the base's state is of steps that were not taken under this binding."""

NUM_ROWS = 5

GUARD_STATISTICS = (
    Statistic("guard_delta_sq", lambda b: b.delta * b.delta),
    Statistic("guard_grad_dot_delta", lambda b: b.grad * b.delta),
)
"""What is summed for the rows `DELTA` and `DOT`."""


_RESUMED, _TRAINED = 4, 5
"""Where `Unverified.settle` keeps these of a layer."""


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
    """Layers still to be checked, the same on all ranks: fresh snapshots, and those not held yet.

    Those are frozen, or `resting`: without a strength when they were bound. `stepped` are the fresh ones that
    have had a gradient since. `foreign`: whether state that the base optimizer has from elsewhere says that
    the weights had been trained before they were bound.
    """

    fresh: set[str] = field(default_factory=set)
    pending: set[str] = field(default_factory=set)
    resting: set[str] = field(default_factory=set)
    stepped: set[str] = field(default_factory=set)
    foreign: bool = False

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
        wanted: Set[str],
    ) -> None:
        """Check the layers that step now and strike them off. Waits for the device.

        `wanted` are the layers with a strength: what is not held yet is taken then. A step with lr 0 and no
        gradient, as checkpoint libraries run one, neither proves nor disproves anything.

        Raises:
            AnchorError: where a layer had left its anchor before its first step, or fine-tuned weights were
                taken for it.
        """
        stepping = has_grad > 0
        moves = (lr != 0) | (found_inf > 0) | (guard[DOT] != 0)
        away = stepping & (guard[HAS_STATE] == 0) & (guard[DELTA] > 0) & moves
        real = stepping & (lr != 0) & (found_inf == 0)
        resumed = (guard[HAS_STATE] > 0) & (guard[DELTA] > 0)
        trained = stepping & (guard[TRAINED] > 0)
        rows = torch.stack([away, guard[MOVED] > 0, real, stepping, resumed, trained]).tolist()
        flags = {fqn: [bool(row[i]) for row in rows] for i, fqn in enumerate(fqns)}
        scoped = {fqn for scope in scopes for fqn in scope}
        parts = [*scopes, [fqn for fqn in fqns if fqn not in scoped]]
        left, tuned = [], []
        for part in parts:
            fresh = [fqn for fqn in part if fqn in self.fresh]
            # Where others were resumed it is only this layer's state that the checkpoint lacked.
            if not any(flags[fqn][_RESUMED] for fqn in fresh):
                left += [fqn for fqn in fresh if flags[fqn][0]]
                tuned += [fqn for fqn in fresh if flags[fqn][_TRAINED] and flags[fqn][2]]
        thawed = [fqn for fqn in fqns if fqn in self.pending and flags[fqn][1]]
        if left:
            raise AnchorError(
                f"{len(left)} layer(s) had left their anchor before the first step, {left[0]!r} for one: "
                "weights were loaded after the snapshot was taken; load the pre-trained weights first and "
                "then build the optimizer, or use anchor='deferred' and call bind() after loading, or "
                "anchor at a checkpoint's path; when resuming, load the projector's (or AdamSPD's) state "
                "too"
            )
        if tuned:
            raise AnchorError(
                f"the optimizer has stepped {len(tuned)} layer(s) before, {tuned[0]!r} for one, and yet they "
                "are at their snapshot to the last bit: it was taken after the training, of fine-tuned "
                "weights; attach before the resumed weights and state are loaded, or load the projector's "
                "state too, or anchor at the path of the pre-trained checkpoint (or of these weights, if "
                "they are meant)"
            )
        rested = [fqn for fqn in thawed if fqn in self.resting]
        if rested:
            raise AnchorError(
                f"{len(rested)} layer(s) have moved while lambda was 0, {rested[0]!r} for one, so that their "
                "pre-trained weights are gone now that it is not; anchor at a checkpoint's path, or give "
                "lambda as a 0-d tensor from the start, which keeps the snapshot"
            )
        if thawed:
            raise AnchorError(
                f"{len(thawed)} layer(s) were frozen at their anchor when it was bound and have other "
                f"weights at their first gradient, {thawed[0]!r} for one: weights were loaded in between; "
                "anchor at a checkpoint's path, or let the layers require gradients when the anchor is "
                "bound"
            )
        for members in parts:
            if any(flags[fqn][2] for fqn in members if fqn in self.fresh):
                self.fresh -= set(members)
        taken = {fqn for fqn in fqns if flags[fqn][3]}
        self.stepped |= taken & self.fresh
        self.pending -= taken & wanted
        self.resting -= taken & wanted


def look_for_training_(
    guard: Tensor,
    optimizer: Optimizer,
    shards: Iterable[BoundShard],
    column: Mapping[str, int],
    unseen: Set[str],
) -> None:
    """Note in the row `TRAINED` which of the `unseen` layers the optimizer has moments of from elsewhere."""
    for shard in shards:
        state = optimizer.state.get(shard.key, {}) if shard.key is not None else {}
        moments = [
            local_tensor(m).detach().reshape(-1)
            for m in state.values()
            if isinstance(m, Tensor) and shard.key is not None and m.shape == shard.key.shape
        ]
        # What an optimizer fills its state with before it has seen a gradient is one number.
        trained = [m.ne(m[0]).any().to(guard.device) for m in moments if m.numel()]
        for piece in shard.slices if trained else ():
            if piece.layer in unseen:
                guard[TRAINED, column[piece.layer]] = torch.stack(trained).any()
