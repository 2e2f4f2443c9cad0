"""Watching the steps: metrics on demand, JSON lines every N steps, a warning of pulls that overshoot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from sharded_spd import warn
from sharded_spd.binding import Binding, flat
from sharded_spd.hostvec import LateScalar
from sharded_spd.layout import BoundShard
from sharded_spd.plan import Plan
from sharded_spd.stats import CHUNK, fixed_sum, sum_over_scopes_
from sharded_spd.telemetry import JsonLines, summarize


class Monitor:
    """Counts engine steps and reports them; between reports nothing leaves the device."""

    def __init__(self, every: int = 0, path: str | None = None) -> None:
        self._every = every
        first = not dist.is_initialized() or dist.get_rank() == 0
        self._log = JsonLines(path) if path and first else None
        self._excess = LateScalar()
        self._warned = False
        self.num_steps = 0

    def step(self, plans: Sequence[Plan], norms: Mapping[str, float]) -> None:
        """Note that an engine step is done."""
        self.num_steps += 1
        self._watch(plans)
        if self._every and self.num_steps % self._every == 0:
            record = self.metrics(plans, norms)
            if self._log is not None:
                self._log.write(record)

    def metrics(self, plans: Sequence[Plan], norms: Mapping[str, float]) -> dict[str, Any]:
        """Numbers of the last engine step; waits for the device."""
        reports = [
            (part.fqns, plan.reports[p])
            for plan in plans
            for p, part in enumerate(plan.parts)
            if p in plan.reports and part.rule.spec.anchored
        ]
        return {"step": self.num_steps, **summarize(reports, norms)}

    def _watch(self, plans: Sequence[Plan]) -> None:
        """Warn once of a pull beyond 1; on a GPU some steps late rather than wait for it."""
        if self._warned:
            return
        reports = [
            report["s"].nan_to_num(nan=0.0).max() for plan in plans for report in plan.reports.values()
        ]
        if reports and reports[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return  # an event must not be asked for while a graph is captured
        if reports:
            self._excess.post(
                torch.stack([s.to(reports[0].device, non_blocking=True) for s in reports]).max()
            )
        excess = self._excess.take()
        if excess is not None and excess > 1:
            self._warned = True
            warn.about_excess(excess)


@torch.no_grad()
def measure_deviation(binding: Binding, shards: Sequence[BoundShard]) -> dict[str, tuple[float, float]]:
    """|w - w0| and |w0| of every layer that has an anchor, now. Collective over the layout's scopes.

    NaN for a frozen layer that was loaded since it was bound.
    """
    pieces = {p.layer: (shard, p) for shard in shards for p in shard.slices if p.layer in binding.held}
    fqns = [fqn for fqn in binding.layout.fqns if fqn in pieces]
    sums = torch.zeros(len(fqns), dtype=torch.float64)
    for i, fqn in enumerate(fqns):
        shard, piece = pieces[fqn]
        held = binding.held[fqn]
        weight = flat(shard.tensor)[piece.offset : piece.offset + piece.numel]
        if held.pending:
            sums[i] = 0.0 if binding.in_place(held, weight) else torch.nan
            continue
        for begin in range(0, weight.numel(), CHUNK):
            delta = weight[begin : begin + CHUNK].double()
            if held.values is not None:
                delta = delta - held.values[begin : begin + CHUNK].to(delta.device).double()
            sums[i] += fixed_sum(delta * delta).to(sums.device)
    sum_over_scopes_(sums, fqns, binding.layout.scopes)
    return {fqn: (x, binding.norms[fqn]) for fqn, x in zip(fqns, sums.sqrt().tolist(), strict=True)}
