"""What is counted, and what is written, beside the steps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sharded_spd import AdamSPD, SPDConfig, attach
from sharded_spd.config import TelemetryConfig
from sharded_spd.errors import ConfigError
from sharded_spd.projection.metrics import JsonLines


@pytest.mark.parametrize("form", ["adam_spd", "attached"])
def test_steps_that_a_scaler_skips(form: str, tmp_path: Path) -> None:
    """An optimizer that is handed `found_inf` is called and skips by itself; another one is not called."""
    model = nn.Linear(3, 2)
    path = tmp_path / "t.jsonl"
    optimizer: Any
    if form == "adam_spd":
        optimizer = AdamSPD(model.named_parameters(), lr=0.01, weight_decay=1.0, fused=True)
        projector = optimizer.projector
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
        config = SPDConfig(telemetry=TelemetryConfig(every=1, path=str(path)))
        projector = attach(optimizer, model, config)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for t in range(6):
        loss = model(torch.ones(4, 3)).sum() * (torch.inf if t in (1, 2, 5) else 1.0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert projector.num_steps == 3
    assert projector.state_dict()["num_steps"] == 3
    if form == "attached":
        assert [json.loads(line)["step"] for line in path.open()] == [1, 2, 3]


def test_one_optimizer_of_two_is_skipped() -> None:
    """Something moved; where both are skipped, nothing did."""
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    optimizers = [torch.optim.Adam(part.parameters(), lr=0.01, fused=True) for part in model]
    projector = attach(optimizers, model, SPDConfig())
    for skipped in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.0)):
        for optimizer, part, found in zip(optimizers, model, skipped, strict=True):
            for param in part.parameters():
                param.grad = torch.ones_like(param)
            optimizer.found_inf = torch.tensor(found)  # type: ignore[attr-defined]
            optimizer.step()
            del optimizer.found_inf  # type: ignore[attr-defined]
    assert projector.num_steps == 2


def test_a_disk_that_is_full_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a line is taken back, so that the lines after it are whole."""
    path = tmp_path / "t.jsonl"
    log = JsonLines(path)
    log.write({"step": 1})
    real = os.write

    class Short:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = open(*args, **kwargs)

        def __enter__(self) -> Short:
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            return real(self.file.fileno(), data[:5])

    monkeypatch.setattr("sharded_spd.projection.metrics.open", Short, raising=False)
    with pytest.raises(OSError, match="No space left"):
        log.write({"step": 2})
    monkeypatch.undo()
    log.write({"step": 3})
    assert [json.loads(line)["step"] for line in path.open()] == [1, 3]


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    """Said when the projector binds."""
    model = nn.Linear(2, 2)
    (tmp_path / "file").write_text("in the way")
    config = SPDConfig(telemetry=TelemetryConfig(every=1, path=str(tmp_path / "file" / "t.jsonl")))
    with pytest.raises(ConfigError, match=r"telemetry\.path: .*cannot be opened"):
        attach(torch.optim.Adam(model.parameters()), model, config)
