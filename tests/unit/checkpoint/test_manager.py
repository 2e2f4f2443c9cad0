"""Checkpoints in one process: odd states, odd folders, and what must not be touched."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sharded_spd import AdamSPD
from sharded_spd.checkpoint import Checkpoints, export_safetensors
from sharded_spd.errors import CheckpointError

Make = Callable[[nn.Module], Any]
ADAMS: dict[str, Make] = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.1),
    "AdamSPD": lambda m: AdamSPD(m.named_parameters(), lr=0.1, weight_decay=1.0),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
}


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.BatchNorm1d(1))


def _step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    model(torch.randn(5, 3)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


def _same(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def _trained_alike(model: nn.Module, optimizer: Any, other: nn.Module, resumed: Any) -> None:
    for _ in range(4):
        state = torch.get_rng_state()
        _step(model, optimizer)
        torch.set_rng_state(state)
        _step(other, resumed)
    _same(model, other)


@pytest.mark.parametrize("make", ADAMS.values(), ids=ADAMS)
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("stray", [False, True])
def test_round_trip(make: Make, steps: int, stray: bool, tmp_path: Path) -> None:
    """Also before the first step, and into an optimizer whose parameters have gradients."""
    model = _net()
    optimizer = make(model)
    for _ in range(steps):
        _step(model, optimizer)
    untouched = len(optimizer.state)
    Checkpoints(tmp_path).save(steps, model, optimizer)
    assert len(optimizer.state) == untouched
    assert all(p.grad is None for p in model.parameters()) == (steps == 0)
    other = _net()
    resumed = make(other)
    if stray:
        other(torch.ones(5, 3)).sum().backward()
    assert Checkpoints(tmp_path).load(other, resumed) is not None
    assert len(resumed.state) == untouched
    _trained_alike(model, optimizer, other, resumed)


@pytest.mark.parametrize("make", ADAMS.values(), ids=ADAMS)
def test_frozen_and_unused(make: Make, tmp_path: Path) -> None:
    """A layer that was frozen in between keeps its moments; one that was never used has none."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = _net(), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    torch.manual_seed(1)
    model = Net()
    optimizer = make(model)
    _step(model, optimizer)
    model.used[0].requires_grad_(False)
    _step(model, optimizer)
    Checkpoints(tmp_path).save(2, model, optimizer)
    torch.manual_seed(1)
    other = Net()
    resumed = make(other)
    other.used[0].requires_grad_(False)
    Checkpoints(tmp_path).load(other, resumed)
    assert not other.used[0].weight.requires_grad
    assert len(resumed.state) == len(optimizer.state) == 6
    for net in (model, other):
        net.used[0].requires_grad_(True)
    _trained_alike(model, optimizer, other, resumed)


def test_several_optimizers_one_without_state(tmp_path: Path) -> None:
    """As plain SGD beside Adam."""

    def make(m: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(m[0].parameters()), torch.optim.SGD(m[2].parameters(), lr=0.1)]

    model = _net()
    optimizers = make(model)
    _step(model, *optimizers)
    Checkpoints(tmp_path).save(1, model, optimizers)
    other = _net()
    resumed = make(other)
    Checkpoints(tmp_path).load(other, resumed)
    torch.manual_seed(3)
    _step(model, *optimizers)
    torch.manual_seed(3)
    _step(other, *resumed)
    _same(model, other)


def test_failed_load_changes_nothing(tmp_path: Path) -> None:
    """Neither the model nor an optimizer's state, groups and gradients."""
    model = _net()
    optimizer = ADAMS["AdamW"](model)
    _step(model, optimizer)
    path = Checkpoints(tmp_path).save(1, model, optimizer)
    file = path / "rank00000.safetensors"
    content = bytearray(file.read_bytes())
    content[8:40] = b"x" * 32
    file.write_bytes(bytes(content))
    other = _net()
    resumed = ADAMS["AdamW"](other)
    with pytest.raises(CheckpointError, match=r"rank00000\.safetensors: is damaged"):
        Checkpoints(tmp_path).load(other, resumed, path=path)
    _same(other, _net())
    assert not resumed.state
    assert Checkpoints(tmp_path).latest() is None


def test_state_in_another_dtype_than_the_parameter(tmp_path: Path) -> None:
    """torch would cast it to the parameter's; a model of another dtype is refused."""

    class Master(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in (p for g in self.param_groups for p in g["params"] if p.grad is not None):
                master = self.state[p].setdefault("master", p.float())
                master.sub_(1e-3 * p.grad.float())
                p.copy_(master)

    model = nn.Linear(3, 2).bfloat16()
    optimizer = Master(model.parameters(), {"lr": 1.0})
    model(torch.randn(4, 3).bfloat16()).sum().backward()
    optimizer.step()
    Checkpoints(tmp_path).save(1, model, optimizer)
    other = nn.Linear(3, 2).bfloat16()
    resumed = Master(other.parameters(), {"lr": 1.0})
    Checkpoints(tmp_path).load(other, resumed)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["master"], resumed.state[q]["master"])
    with pytest.raises(CheckpointError, match=r"model/weight: is torch\.bfloat16, wanted torch\.float32"):
        Checkpoints(tmp_path).load(nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: torch.optim.AdamW([{"params": m[0].parameters()}, {"params": m[2].parameters()}]), "cut"),
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.1), "exp_avg: the optimizer has no such tensor"),
        (lambda m: torch.optim.AdamW(m.parameters(), amsgrad=True), "max_exp_avg_sq: missing"),
    ],
)
def test_another_optimizer_is_refused(make: Make, words: str, tmp_path: Path) -> None:
    """What torch would load in part, or under another group's settings."""
    model = _net()[:3]
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    Checkpoints(tmp_path).save(1, model, optimizer)
    other = _net()[:3]
    with pytest.raises(CheckpointError, match=words):
        Checkpoints(tmp_path).load(other, make(other))
    spd = AdamSPD(model.named_parameters(), weight_decay=2.0)
    Checkpoints(tmp_path).save(2, model, spd)
    with pytest.raises(CheckpointError, match="AdamSPD, whose weight_decay is lambda"):
        Checkpoints(tmp_path).load(other, torch.optim.AdamW(other.parameters()))


def test_extra(tmp_path: Path) -> None:
    """Keys that look alike, counters, tuples; what cannot be stored is named."""
    one, two = torch.tensor([1.0]), torch.tensor([2.0])
    model = nn.Linear(1, 1)
    extra = {"a/b": one, "a": {"b": two}, 1: one, "1": two, "t": (1, (2.5, None)), "$x": b"y"}
    schedule = torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD(model.parameters()), [2, 2, 5])
    Checkpoints(tmp_path).save(1, model, scheduler=schedule, extra=extra)
    found = Checkpoints(tmp_path).load(model, scheduler=schedule)
    assert found is not None
    assert repr(found.extra) == repr(extra)
    assert sorted(schedule.milestones.elements()) == [2, 2, 5]
    for bad in ({"\ud800": 1}, {"x": "\ud800"}, {"f": print}):
        with pytest.raises(CheckpointError, match=r"no text|pickling"):
            Checkpoints(tmp_path).save(2, model, extra=bad)
    for step in (-1, 1.5, "3", True):
        with pytest.raises(CheckpointError, match="wanted a whole number"):
            Checkpoints(tmp_path).save(step, model)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_what_is_new_is_never_dropped(tmp_path: Path) -> None:
    """Newer folders that are damaged do not count; a link is not followed; foreign files stay."""
    model = nn.Linear(1, 1)
    run, elsewhere = tmp_path / "run", tmp_path / "backup"
    for step in (100, 200, 300):
        Checkpoints(run, keep_last=3).save(step, model)
    for step in (200, 300):
        os.truncate(run / f"step-{step:08d}" / "rank00000.safetensors", 9)
    (run / "step-00000100").rename(elsewhere)
    (run / "step-00000100").symlink_to(elsewhere)
    (run / "notes.txt").write_text("mine")
    checkpoints = Checkpoints(run, keep_last=1)
    assert checkpoints.load(model) is not None
    new = checkpoints.save(150, model)
    assert checkpoints.latest() == new
    assert (elsewhere / "complete.json").is_file()
    assert not (run / "step-00000100").is_symlink()
    assert (run / "notes.txt").is_file()


def test_directory_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path, and another working directory later."""
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints("run")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    path = checkpoints.save(1, nn.Linear(1, 1))
    assert path == tmp_path / "run" / "step-00000001"
    assert checkpoints.latest() == path


def test_exports(tmp_path: Path) -> None:
    """A view in another order is a tensor of its own; a tie is written once; two of one name are refused."""
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("a", "b", "tied")})
    model["b"].weight = nn.Parameter(model["a"].weight.data.t())
    model["tied"].weight = model["a"].weight
    export_safetensors(model, tmp_path / "model")
    found = load_file(tmp_path / "model" / "model.safetensors")
    assert found.keys() == {"a.weight", "b.weight"}
    assert torch.equal(found["b.weight"], found["a.weight"].t())
    with pytest.raises(CheckpointError, match="'w' stands for several"):
        export_safetensors(model, tmp_path / "other", names={"a.weight": "w", "b.weight": "w"})
    assert not (tmp_path / "other").exists()
