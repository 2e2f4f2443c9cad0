"""Which models look like a stage of a pipeline by their names."""

from __future__ import annotations

from torch import nn

from sharded_spd.engines.stages import is_stage


def _blocks(first: int, last: int) -> nn.ModuleDict:
    """As a pipeline cuts them: the numbers are the whole model's."""
    blocks = nn.ModuleDict({str(k): nn.Linear(2, 2) for k in range(first, last)})
    return nn.ModuleDict({"layers": blocks, "head": nn.Linear(2, 1)})


def _looks(model: nn.Module, *, given: bool) -> bool:
    named = dict(model.named_parameters())
    return is_stage(list(named.values()), model if given else None, named)


def test_layers_that_begin_above_0_are_a_stage() -> None:
    """With the model, and by the parameters' names."""
    for given in (True, False):
        assert _looks(_blocks(2, 4), given=given)
        assert not _looks(_blocks(0, 4), given=given)
    assert _looks(_blocks(3, 4), given=True)


def test_layers_behind_one_without_weights_are_none() -> None:
    """As in the classifiers of torchvision; numbers that mean something else may have gaps."""
    heads = nn.Sequential(nn.Dropout(), nn.Linear(2, 2), nn.ReLU(), nn.Dropout(), nn.Linear(2, 2))
    assert not _looks(nn.ModuleDict({"classifier": heads}), given=True)
    assert not _looks(nn.ModuleDict({"classifier": heads}), given=False)
    widths = nn.ModuleDict({"3": nn.Linear(2, 2), "5": nn.Linear(2, 2)})
    assert not _looks(nn.ModuleDict({"widths": widths}), given=True)
