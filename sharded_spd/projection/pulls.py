"""What a rule does to one slice in plain torch: edit its gradient, and pull it by row, element or with state.

A pull that is one number per layer goes through the kernels, see `KernelBatch.pull_`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sharded_spd.kernels.reference import pull_, pull_back_
from sharded_spd.projection.slices import LocalSlice
from sharded_spd.rules.base import Options, Stats
from sharded_spd.rules.rows import expand_rows


def edit_(item: LocalSlice, plan: Mapping[str, Tensor], active: Tensor) -> None:
    """Edit a slice's gradient as its rule says (modified in place), where its layer is `active`."""
    grad, flat_grad = item.shard.grad, item.tensors.flat_grad()
    if grad is None or flat_grad is None:
        return
    values = {name: per_layer[item.index] for name, per_layer in plan.items()}
    for cut, block in item.blocks(grads=True):
        target = flat_grad[cut]
        edited = item.layers.rule.edit_grad(block, values) / item.tensors.grad_factor
        keep = ~active[item.index] | ~torch.isfinite(edited)
        target.copy_(torch.where(keep, target, edited.to(target.dtype)))
    if not grad.is_contiguous() and item.tensors.grad is not None:
        grad.copy_(item.tensors.grad.view(grad.shape))


@dataclass(frozen=True, slots=True)
class SlicePull:
    """The pull of one rule's layers in one step, slice by slice.

    `s` is per layer `[num_layers]` or per row `[num_rows]`, `active` and `limit` `[num_layers]`.
    """

    stats: Stats
    s: Tensor
    options: Options
    active: Tensor
    limit: Tensor

    def __call__(self, item: LocalSlice) -> None:
        """Advance the slice's state, and pull it (modified in place)."""
        if item.state:
            self._advance(item)
        {"layer": self._by_layer, "row": self._by_row, "element": self._by_element}[
            item.layers.rule.spec.granularity
        ](item)
        item.write_back()

    def _advance(self, item: LocalSlice) -> None:
        rule, active = item.layers.rule, self.active[item.index]
        for cut, block in item.blocks(grads=False):
            new = rule.next_shard_state(block, self.stats, partial(_to_elements, item=item, cut=cut))
            for name, old in block.state.items():
                old.copy_(torch.where(active, new[name].to(old.dtype), old))

    def _by_layer(self, item: LocalSlice) -> None:
        pull_(item.tensors.flat_weight(), item.tensors.anchor, self.s[item.index])

    def _by_row(self, item: LocalSlice) -> None:
        weight = item.tensors.flat_weight()
        for cut, block in item.blocks(grads=False):
            pull_(weight[cut], block.anchor, _to_elements(self.s, item=item, cut=cut))

    def _by_element(self, item: LocalSlice) -> None:
        rule, i, weight = item.layers.rule, item.index, item.tensors.flat_weight()
        for cut, block in item.blocks(grads=False):
            each = rule.pull_elements(block, self.options.lr[i], self.options.weight_decay[i])
            each = torch.where(self.active[i] & torch.isfinite(each), each, 0.0).clamp(max=self.limit[i])
            if rule.spec.pulls_kept:
                pull_back_(weight[cut], each * block.kept_delta)
            else:
                pull_(weight[cut], block.anchor, each)


def _to_elements(per_row: Tensor, *, item: LocalSlice, cut: slice) -> Tensor:
    """Expand a rule's per-row values to the elements of one chunk of a slice."""
    return expand_rows(per_row[item.layers.row_ranges[item.index]], item.spans, cut.start, cut.stop)
