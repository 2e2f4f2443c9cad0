"""Checks param groups that a DeepSpeed checkpoint loads: refuses another anchor, repairs two defects.

Loading a universal checkpoint at stage 3 gives every param group the settings of the first, and makes all
sub-groups share one `step` tensor, which the optimizer then advances once for each of them.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sharded_spd.errors import another_anchor

_FINGERPRINT, _INDEX, _RATES = "spd_anchor", "spd_group", "spd_lrs"
"""Keys of a param group: the anchors' fingerprint, its number, the lr of every group at the last step."""


class GroupMarks:
    """Marks the param groups of an inner optimizer, and checks the marks after a load.

    `vouched`: a checkpoint of a run with the same anchors was loaded.
    """

    def __init__(self, optimizer: Optimizer, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.vouched = False
        self._optimizer = weakref.ref(optimizer)
        self._groups = [
            {key: value for key, value in group.items() if key not in ("params", "step")}
            for group in optimizer.param_groups
        ]
        self._stamp(optimizer)
        self._hook = optimizer.register_load_state_dict_post_hook(self._after_load)

    def remove(self) -> None:
        """Remove the marks."""
        self._hook.remove()
        optimizer = self._optimizer()
        for group in [] if optimizer is None else optimizer.param_groups:
            for key in (_FINGERPRINT, _INDEX, _RATES):
                group.pop(key, None)

    def _stamp(self, optimizer: Optimizer) -> None:
        for index, group in enumerate(optimizer.param_groups):
            group[_FINGERPRINT], group[_INDEX] = self.fingerprint, index

    def _after_load(self, optimizer: Optimizer) -> None:
        self._check(optimizer)
        self.vouched = all(_FINGERPRINT in group for group in optimizer.param_groups)
        self._stamp(optimizer)

    def _check(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            saved = group.get(_FINGERPRINT, self.fingerprint)
            if saved != self.fingerprint:
                raise another_anchor(
                    "this run",
                    "the checkpoint's",
                    wanted=saved,
                    got=self.fingerprint,
                    advice="attach before load_checkpoint, to the weights that the checkpoint began from",
                )

    def mend(self, optimizer: Optimizer, scheduler: Any) -> None:
        """Repair the two defects where they occur; visits each group and state.

        Raises:
            AnchorError: the loaded checkpoint was written with another anchor.
        """
        self._check(optimizer)
        _split_steps(optimizer)
        groups = optimizer.param_groups
        if len(groups) != len(self._groups):  # stages 1 and 2 show one group per call, and load them well
            return
        taken = [i for i, group in enumerate(groups) if group.get(_INDEX, i) != i]
        rates = _scheduled(scheduler, len(groups)) or groups[0].get(_RATES) if taken else None
        for i in taken:
            groups[i].update(self._groups[i])
            groups[i][_FINGERPRINT], groups[i][_INDEX] = self.fingerprint, i
            if rates is not None and len(rates) == len(groups):
                groups[i]["lr"] = rates[i]
        for group in groups:
            group[_RATES] = [g["lr"] for g in groups]


def _split_steps(optimizer: Optimizer) -> None:
    seen: set[int] = set()
    for state in optimizer.state.values():
        step = state.get("step")
        if isinstance(step, Tensor):
            if id(step) in seen:
                state["step"] = step.clone()
            seen.add(id(state["step"]))


def _scheduled(scheduler: Any, count: int) -> list[Any] | None:
    """Each group's current lr by the scheduler; DeepSpeed's own schedulers forget it when loaded."""
    if scheduler is None:
        return None
    rates = scheduler.get_last_lr() if isinstance(scheduler, LRScheduler) else scheduler.get_lr()
    return list(rates) if len(rates) == count else None
