"""A tied table of tokens with other rows than its file's, on every rank as if the file had the very rows."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.parity.cases import SPD, gradients, tensors
from tests.support.compare import assert_bits_equal
from tests.support.engines import Engine
from tests.support.training import Form, Training, anchor_file

SHAPES = {"embed.weight": (9, 4), "body.weight": (5, 4)}
TIES = {"lm_head.weight": "embed.weight"}


def resized(engine: Engine, *, form: Form) -> None:
    """The file has 6 rows, or 12, under the other name of the tied table."""
    start, base = tensors(SHAPES, dtype=engine.dtype), tensors(SHAPES, dtype=engine.dtype, seed=3)
    rows, own = base["embed.weight"], start["embed.weight"]
    for stored, same in (
        (rows[:6], torch.cat([rows[:6], own[6:]])),
        (torch.cat([rows, rows[:3]]), rows),
    ):
        runs = []
        for file in ({"lm_head.weight": stored}, {"embed.weight": same}):
            path = anchor_file(engine, {"body.weight": base["body.weight"], **file})
            training = Training(engine, start, SPD, form=form, anchor=path, ties=TIES, give_model=True)
            dist.barrier()  # all have read it
            pulled = 0
            for grads in gradients(start, 6):
                training.step({**grads, "lm_head.weight": grads["embed.weight"]})
                pulled += training.projector.metrics()["activation_rate"] > 0
            assert pulled
            runs.append((training.weights(), training.projector.fingerprint))
        (got, prints), (want, expected) = runs
        assert_bits_equal(got, want)
        assert prints == expected
