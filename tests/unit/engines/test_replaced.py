"""An optimizer whose parameters are the model's no more trains nothing; it says so at its first step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim import Optimizer

from sharded_spd import AdamSPD, SPDConfig, attach
from sharded_spd.errors import BindingError


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.Linear(3, 2))


def _adam_spd(model: nn.Module) -> Optimizer:
    return AdamSPD(model.named_parameters(), lr=0.1, weight_decay=1.0, model=model)


def _attached(model: nn.Module) -> Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    attach(optimizer, model, SPDConfig())
    return optimizer


FORMS = (_adam_spd, _attached)


def _step(model: nn.Module, optimizer: Optimizer) -> None:
    model(torch.arange(5)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _resize(model: nn.Sequential) -> None:
    model[0] = nn.Embedding(7, 4)


def _empty(model: nn.Sequential) -> None:
    model.to("meta").to_empty(device="cpu")
    for param in model.parameters():
        nn.init.ones_(param)


def _assign(model: nn.Sequential) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def _weight_norm(model: nn.Sequential) -> None:
    parametrizations.weight_norm(model[1])


@pytest.mark.parametrize("make", FORMS)
@pytest.mark.parametrize("change", [_resize, _empty, _assign, _weight_norm])
def test_a_layer_put_in_place_of_the_optimizers_raises(
    change: Callable[[nn.Sequential], None], make: Callable[[nn.Module], Optimizer]
) -> None:
    """Its gradients go to the new parameter, and the optimizer holds the old one."""
    model = _model()
    optimizer = make(model)
    change(model)
    with pytest.raises(BindingError, match=r"layer '\d\.weight' of the model is another parameter now"):
        _step(model, optimizer)


@pytest.mark.parametrize("make", FORMS)
def test_it_is_seen_when_all_gradients_cease(make: Callable[[nn.Module], Optimizer]) -> None:
    """In the middle of a run."""
    model = _model()
    optimizer = make(model)
    _step(model, optimizer)
    _assign(model)
    with pytest.raises(BindingError, match="another parameter now"):
        _step(model, optimizer)


def test_binding_anew_sees_it_too() -> None:
    """The optimizer knows the layer's name of old."""
    model = _model()
    optimizer = AdamSPD(model.named_parameters(), lr=0.1, weight_decay=1.0)
    _resize(model)
    with pytest.raises(BindingError, match=r"layer '0\.weight' of the model is another parameter now"):
        optimizer.bind(model)


class _Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """Twice."""
        return 2 * x


def _wrap(model: nn.Sequential) -> None:
    parametrize.register_parametrization(model[1], "weight", _Double())


def _cast(model: nn.Sequential) -> None:
    model.double()


def _drop(model: nn.Sequential) -> None:
    del model[2]


def _freeze(model: nn.Sequential) -> None:
    model[0] = nn.Embedding(5, 4).requires_grad_(False)


@pytest.mark.parametrize("make", FORMS)
@pytest.mark.parametrize("change", [_wrap, _cast, _drop, _freeze])
def test_what_leaves_training_in_order_is_let_be(
    change: Callable[[nn.Sequential], None], make: Callable[[nn.Module], Optimizer]
) -> None:
    """The same parameter elsewhere or of another dtype, a layer taken out, one that is frozen."""
    model = _model()
    optimizer = make(model)
    change(model)
    _step(model, optimizer)


def test_a_successor_that_the_optimizer_has_as_well_is_let_be() -> None:
    """A resized layer, added as a group."""
    model = _model()
    optimizer = AdamSPD(model.parameters(), lr=0.1, weight_decay=1.0, model=model)
    _resize(model)
    optimizer.add_param_group({"params": [model[0].weight]})
    before = model[0].weight.detach().clone()
    _step(model, optimizer)
    assert not torch.equal(model[0].weight, before)


def test_a_compiled_model_and_one_with_more_parameters_are_let_be() -> None:
    """The names are the same, and what is not optimized is none of its business."""
    model = _model()
    whole = nn.ModuleDict({"part": model, "rest": nn.Linear(2, 2)})
    optimizer = AdamSPD(model.parameters(), lr=0.1, weight_decay=1.0, model=whole)
    _step(model, optimizer)
    compiled = torch.compile(model, backend="eager")
    optimizer = AdamSPD(model.parameters(), lr=0.1, weight_decay=1.0, model=compiled)
    _step(model, optimizer)
