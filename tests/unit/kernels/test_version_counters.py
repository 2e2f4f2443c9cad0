"""Autograd knows of every write: what a backward still needs cannot change in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.optim import Optimizer

from sharded_spd import AdamSPD
from sharded_spd.kernels import REFERENCE, Backend, kernels_for
from tests.support.slices import mixed_work

BACKENDS = [pytest.param(kernels_for("cpu"), id="fastest"), pytest.param(REFERENCE, id="reference")]
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "torch's": lambda model: torch.optim.Adam(model.parameters(), lr=0.1),
    "pulled": lambda model: AdamSPD(model.named_parameters(), lr=0.1, weight_decay=1.0),
    "pulled, amsgrad": lambda model: AdamSPD(
        model.named_parameters(), lr=0.1, weight_decay=1.0, amsgrad=True
    ),
    "pulled, apart": lambda model: AdamSPD(model.named_parameters(), lr=0.1, weight_decay=1.0, fused=False),
    "without a pull": lambda model: AdamSPD(model.named_parameters(), lr=0.1),
}


def _step_between_forward_and_backward(critic: nn.Module, optimizer: Optimizer) -> None:
    """As in adversarial training: the generator's loss was found with weights that the step changes."""
    torch.manual_seed(0)
    generator = nn.Linear(4, 4)
    for _ in range(2):
        optimizer.zero_grad()
        critic(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    fake = generator(torch.randn(8, 4))
    loss = critic(fake).sum()
    optimizer.zero_grad()
    critic(fake.detach()).square().sum().backward()
    optimizer.step()
    loss.backward(inputs=[generator.weight])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_between_forward_and_backward_raises(kind: str) -> None:
    critic = nn.Linear(4, 1, bias=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        _step_between_forward_and_backward(critic, OPTIMIZERS[kind](critic))


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_of_split_weights_raises_as_well(kind: str) -> None:
    """A DTensor and its local tensor count apart: it is the DTensor that autograd has saved."""
    critic = nn.Sequential(nn.Linear(4, 4, bias=False))
    parallelize_module(critic, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})
    optimizer = OPTIMIZERS[kind](critic)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        _step_between_forward_and_backward(critic, optimizer)
    (weight,) = critic.parameters()
    moments = [value for name, value in optimizer.state[weight].items() if name != "step"]
    before = [t._version for t in moments]
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert all(isinstance(t, DTensor) for t in moments)
    assert all(t._version > then for t, then in zip(moments, before, strict=True))


def _versions(tensors: list[Tensor]) -> list[int]:
    return [t._version for t in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_kernels_count_what_they_write(backend: Backend, amsgrad: bool) -> None:
    """Adam's step the weights and all its moments, a pull the weights alone, and only those it moves."""
    work = mixed_work((5, 700), seed=0, amsgrad=amsgrad, weights=[torch.float32])
    for s in work.slices:
        s.grad = torch.ones_like(s.weight)
    weights = [s.weight for s in work.slices]
    moments = [t for m in work.moments for t in m.tensors if t is not None]
    table = backend.table(work.slices)
    before = _versions([*weights, *moments])
    table.adam_(work.moments, work.numbers)
    stepped = _versions([*weights, *moments])
    assert all(now > then for now, then in zip(stepped, before, strict=True))
    table.pull_(torch.tensor([0.0, 0.5], dtype=torch.float64))
    pulled = _versions(weights)
    assert pulled[1] > stepped[1]
    # Only the C kernels see s on the host; the others may count what they wrote the same bits to.
    assert pulled[0] == stepped[0] or backend.name != "cpu"
    assert _versions(moments) == stepped[len(weights) :]
