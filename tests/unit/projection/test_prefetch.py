"""Anchors on their way to the device: what is copied when; the device is made up, its buffers are here."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sharded_spd import SPDConfig, attach
from sharded_spd.anchors.base import Values
from sharded_spd.config import AnchorConfig
from sharded_spd.projection import prefetch, slices
from sharded_spd.projection.prefetch import ahead
from sharded_spd.rules.statistics import CHUNK
from tests.support.models import Probe

DEVICE = torch.device("cuda", 0)
STEP = 2 * CHUNK
"""Elements of a piece below."""


class Carrier:
    """Copies when told to wait, as late as it may be, and spoils what is in a buffer when told to start."""

    log: list[tuple[str, int, float]]

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sources: list[Tensor] = [torch.empty(0)] * 2
        self._buffers = [torch.empty(STEP), torch.empty(STEP)]

    def start(self, slot: int, piece: Tensor) -> None:
        self._sources[slot] = piece
        self._buffers[slot].fill_(torch.nan)
        self.log.append(("start", slot, float(piece[0])))

    def wait(self, slot: int) -> Tensor:
        source = self._sources[slot]
        self.log.append(("wait", slot, float(source[0])))
        return self._buffers[slot][: source.numel()].copy_(source)


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, float]]]:
    Carrier.log = []
    monkeypatch.setattr(prefetch, "CudaCarrier", Carrier)
    monkeypatch.setattr(prefetch, "PIECE_BYTES", 4 * STEP)
    yield Carrier.log
    gc.collect()
    assert not prefetch._lanes, "the buffers are kept beyond the step"


def chunks(values: Values) -> Tensor:
    """All of the values, read as a step reads them; the last chunk is asked for beyond the end."""
    return torch.cat([values[begin : begin + CHUNK].clone() for begin in range(0, values.numel(), CHUNK)])


def three() -> list[Tensor]:
    """A slice of three pieces, one of part of a piece, one of exactly a piece."""
    sizes, firsts = (2 * STEP + 5, 7, STEP), (0, 1000000, 2000000)
    return [
        torch.arange(first, first + n, dtype=torch.float32) for n, first in zip(sizes, firsts, strict=True)
    ]


def test_every_piece_is_copied_once_and_the_next_before_one_is_used(log: list) -> None:
    tensors = three()
    for near, tensor in zip(ahead([(t, DEVICE) for t in tensors]), tensors, strict=True):
        assert near.device == DEVICE
        assert near.numel() == tensor.numel()
        assert torch.equal(chunks(near), tensor)
    firsts = [0.0, float(STEP), 2.0 * STEP, 1000000.0, 2000000.0]
    assert [first for what, _, first in log if what == "start"] == firsts
    for one, following in pairwise(firsts):
        waits = [i for i, (what, _, first) in enumerate(log) if what == "wait" and first == one]
        (started,) = [i for i, (what, _, first) in enumerate(log) if what == "start" and first == following]
        assert waits[0] < started  # not before what the buffer held is let go
        assert started == waits[0] + 1  # but before the first chunk is worked on
    assert [slot for what, slot, _ in log if what == "start"] == [0, 1, 0, 1, 0]


def test_any_order_gives_the_values(log: list) -> None:
    """Rules that skip slices, and every pass anew."""
    tensors = three()
    near = ahead([(t, DEVICE) for t in tensors])
    for i in (2, 0, 0, 1, 0, 2, 2, 1):
        assert torch.equal(chunks(near[i]), tensors[i])
    assert torch.equal(near[0][CHUNK : CHUNK + 9], tensors[0][CHUNK : CHUNK + 9])
    assert near[0][5:5].numel() == 0


def test_what_lies_across_pieces_is_copied_by_itself() -> None:
    class Here(torch.Tensor):
        def to(self, *args, **kwargs):  # the made up device holds nothing
            return self

    tensor = torch.arange(3.0 * STEP).as_subclass(Here)
    (near,) = ahead([(tensor, DEVICE)])
    assert torch.equal(near[STEP - 5 : STEP + 5], tensor[STEP - 5 : STEP + 5])


def test_what_is_there_already_stays(log: list) -> None:
    here, nothing, empty = torch.ones(5), None, torch.empty(0)
    wanted = [(here, torch.device("cpu")), (nothing, DEVICE), (empty, DEVICE)]
    assert all(a is b for a, (b, _) in zip(ahead(wanted), wanted, strict=True))
    assert not log


@pytest.mark.parametrize("rule", ["spd", "l2sp"])
def test_a_step_reads_all_of_it_through_the_lane(
    rule: str, monkeypatch: pytest.MonkeyPatch, log: list
) -> None:
    """Bit-equal to anchors that are read where they lie."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (5, CHUNK), "b": (3,), "c": (STEP,)}
    start = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    grads = [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(4)
    ]

    def trained() -> dict[str, Tensor]:
        model = Probe(start)
        params = dict(model.named_parameters())
        optimizer = torch.optim.Adam(params.values(), lr=0.02)
        attach(optimizer, model, SPDConfig(rule=rule, weight_decay=1.5, anchor=AnchorConfig(device="cpu")))
        for drawn in grads:
            for name, p in params.items():
                p.grad = drawn[name].clone()
            optimizer.step()
        return {name: p.detach().clone() for name, p in params.items()}

    want = trained()
    assert not log
    monkeypatch.setattr(slices.LocalSlices, "_on_gpu", staticmethod(lambda live: True))
    monkeypatch.setattr(slices, "ahead", lambda wanted: ahead([(values, DEVICE) for values, _ in wanted]))
    got = trained()
    assert log
    assert all(torch.equal(got[name], want[name]) for name in want)
