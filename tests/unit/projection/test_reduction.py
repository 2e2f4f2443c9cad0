"""What is read on the host only when the next step begins, as on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sharded_spd import AdamSPD
from sharded_spd.errors import AnchorError
from sharded_spd.projection import reduction


@pytest.fixture(autouse=True)
def _late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduction, "comes_late", lambda numbers: True)


def _optimizer() -> tuple[nn.Parameter, AdamSPD]:
    param = nn.Parameter(torch.ones(5))
    return param, AdamSPD([param], lr=0.1, weight_decay=1.0)


def _step(param: nn.Parameter, optimizer: AdamSPD) -> None:
    param.grad = torch.ones(5)
    optimizer.step()


def test_the_guard_raises_a_step_later_and_stays() -> None:
    """Weights that were loaded after the snapshot are found in the first step, and told in the second."""
    param, optimizer = _optimizer()
    with torch.no_grad():
        param.add_(1.0)
    _step(param, optimizer)
    for _ in range(2):
        with pytest.raises(AnchorError, match="loaded after the snapshot"):
            _step(param, optimizer)


def test_what_waits_is_read_before_the_state_is_handed_out() -> None:
    """A run that ends after one step is told when it saves."""
    param, optimizer = _optimizer()
    with torch.no_grad():
        param.add_(1.0)
    _step(param, optimizer)
    with pytest.raises(AnchorError, match="loaded after the snapshot"):
        optimizer.projector.state_dict()


def test_a_good_run_is_the_same() -> None:
    """To the last bit."""
    found = []
    for late in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reduction, "comes_late", lambda numbers, late=late: late)
            torch.manual_seed(0)
            param, optimizer = _optimizer()
            for _ in range(4):
                _step(param, optimizer)
            found.append(param.detach().clone())
    assert torch.equal(*found)
