"""DeepSpeed's engines through the same checkpoints; each function runs on every rank of a launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from sharded_spd.checkpoint import Checkpoints
from sharded_spd.errors import AnchorError, CheckpointError, UnsupportedError
from tests.parity.cases import tensors
from tests.parity.zero_cases import GROUPS, drawn, rounded
from tests.support.compare import assert_bits_equal
from tests.support.engines import Engine
from tests.support.refusals import refused
from tests.support.training import config_of
from tests.support.zero import Setting, ZeroTraining


def same_ranks(engine: Engine, *, setting: Setting) -> None:
    """Bit for bit over twenty further steps; without its marker DeepSpeed's folder is no checkpoint."""
    start = rounded(tensors(dtype=torch.float32), setting)
    config, grads = config_of(GROUPS), drawn(setting, 24)
    checkpoints = Checkpoints(engine.scratch / "run", keep_last=2)
    first = ZeroTraining(start, GROUPS, setting, config=config)
    for t, given in enumerate(grads, start=1):
        first.step(given)
        if t <= 4:
            checkpoints.save(t, first.engine, projector=first.projector, extra={"seen": t})
    want = first.masters()
    first.close()
    assert len(list(checkpoints.directory.iterdir())) == 2

    again = ZeroTraining(start, GROUPS, setting, config=config)
    found = checkpoints.load(again.engine, projector=again.projector)
    assert found is not None
    assert (found.step, found.extra) == (4, {"seen": 4})
    again.steps = 4
    for given in grads[4:]:
        again.step(given)
    assert_bits_equal(again.masters(), want)
    refused(
        engine,
        lambda: Checkpoints(engine.scratch / "b", asynchronous=True).save(1, again.engine),
        (UnsupportedError,),
        "asynchronous",
    )
    _one_rank_cannot_write(engine, again, checkpoints)
    again.close()

    wrong = ZeroTraining(
        rounded(tensors(seed=3, dtype=torch.float32), setting), GROUPS, setting, config=config
    )
    refused(
        engine,
        lambda: checkpoints.load(wrong.engine, projector=wrong.projector),
        (AnchorError,),
        r"layers .*: another anchor than the checkpoint's",
    )
    if engine.rank == 0:
        (found.path / "complete.json").unlink()
    older = checkpoints.latest()
    assert older is not None
    assert older.name == "step-00000003"
    refused(
        engine,
        lambda: checkpoints.load(wrong.engine, projector=wrong.projector, path=found.path),
        (CheckpointError,),
        "no complete checkpoint",
    )
    wrong.close()


def _one_rank_cannot_write(engine: Engine, training: ZeroTraining, checkpoints: Checkpoints) -> None:
    """DeepSpeed has barriers after its files: the failure is raised behind them, and its folder is gone."""

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(checkpoints.directory.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        if engine.rank == engine.world - 1:
            patch.setattr(training.engine.checkpoint_engine, "save", full)
        refused(
            engine,
            lambda: checkpoints.save(9, training.engine, projector=training.projector),
            (CheckpointError,),
            "DeepSpeed could not save: .*No space left",
        )
    dist.barrier()
    assert sorted(checkpoints.directory.iterdir()) == before
