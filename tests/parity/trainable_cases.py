"""Few trainable layers among frozen ones, as the oracle has them; each function runs on every rank.

Small enough that some ranks hold nothing of what is trained: only the other ranks know what a step does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from tests.parity.cases import SPD, assert_as_good, gradients, tensors
from tests.parity.zero_cases import compare, rounded
from tests.reference.oracle import Oracle
from tests.support.compare import assert_bits_equal
from tests.support.engines import Engine
from tests.support.launch import Task
from tests.support.training import FORMS, Form, Training, config_of
from tests.support.zero import Setting, ZeroTraining

Kind = Literal["adapters", "trunk"]
KINDS: tuple[Kind, ...] = ("adapters", "trunk")

SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "adapters": {
        "embed.weight": (6, 4),
        "block.attn.weight": (10, 6),
        "block.attn.lora_A": (1, 7),
        "block.attn.lora_B": (1, 9),
        "block.mlp.weight": (12, 15),
        "block.mlp.bias": (12,),
    },
    "trunk": {
        "embed.weight": (6, 4),
        "block.attn.weight": (5, 3),
        "block.mlp.weight": (4, 5),
        "head.weight": (1, 1),
        "scale.weight": (1,),
    },
    "adapters_flat": {
        "embed.weight": (6, 4),
        "block.attn.weight": (10, 6),
        "block.mlp.weight": (12, 15),
        "lora.A": (1, 2),
        "lora.B": (1,),
    },
    "trunk_flat": {
        "block.attn.weight": (5, 3),
        "block.mlp.weight": (4, 5),
        "scale.weight": (1,),
    },
}
"""Adapters of one row beside weights that fill the other ranks' parts, and heads of one element.

"_flat": where a unit is one tensor, its layers are frozen or trained together.
"""

_SPREAD = {
    ("fsdp1_flat", 2, "adapters"),
    ("fairscale_fsdp", 2, "adapters"),
    ("fairscale_fsdp_plain", 2, "adapters"),
    ("fairscale_fsdp_plain", 4, "adapters"),
    ("oss", 2, "adapters"),
    ("oss", 2, "trunk"),
}
"""Where all ranks hold something of what is trained after all."""

_TRAINED = ("lora", "head", "scale")


def _start(kind: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """The layers, which of them are trained, and which are frozen."""
    start = tensors(SHAPES[kind], dtype=dtype)
    trained = tuple(name for name in start if any(word in name for word in _TRAINED))
    return start, trained, tuple(name for name in start if name not in trained)


def _drawn(start: Mapping[str, Tensor], trained: tuple[str, ...]) -> list[dict[str, Tensor]]:
    """Six steps; where two layers are trained, one of them has no gradient in two steps."""
    return gradients(start, 6, missing={2: trained[1:], 4: trained[:1] if trained[1:] else ()})


def few_trained(engine: Engine, *, form: Form, kind: Kind, only: bool, idle: bool) -> None:
    """The trained layers follow the oracle, the frozen ones keep every bit.

    `only`: the optimizer holds the trained layers alone, else all. `idle`: some rank holds nothing of them.
    """
    flat = not getattr(engine, "orig", True) or getattr(engine, "flatten", False)
    start, trained, frozen = _start(f"{kind}_flat" if flat else kind, engine.dtype)
    training = Training(engine, start, SPD, form=form, frozen=frozen, leave_out=frozen if only else ())
    held = training.projector.export_anchors()
    assert _without(sum(held[name].piece.numel for name in trained if name in held)) == idle
    live = {name: start[name] for name in trained}
    oracle, pulled = Oracle(live, live, SPD), 0
    drawn = _drawn(start, trained)
    for t, given in enumerate(drawn):
        training.backward(given)
        seen = engine.arrived(training.params, given)
        training.update()
        stats = oracle.step({name: g for name, g in seen.items() if name in trained})
        pulled += sum(one.s != 0 for one in stats.values())
        if t % 3 == 2:
            got = training.weights()
            assert_as_good({n: got[n] for n in trained}, oracle.weights, live, label=f"step {t}:")
            assert_bits_equal({n: got[n] for n in frozen}, {n: start[n] for n in frozen})
    assert pulled >= 1, "the case pulls nothing and shows nothing"


def _without(numel: int) -> bool:
    """Whether some rank has 0; collective."""
    fewest = torch.tensor(numel)
    dist.all_reduce(fewest, dist.ReduceOp.MIN)
    return int(fewest) == 0


def few_trained_zero(engine: Engine, *, setting: Setting, kind: Kind, only: bool, idle: bool) -> None:
    """The same under DeepSpeed, where a layer without a gradient arrives as zeros.

    At stage 3 DeepSpeed hands on the layer's last gradient once more.
    """
    drawn_start, trained, frozen = _start(kind, torch.float32)
    start = rounded(drawn_start, setting)
    live = {name: start[name] for name in trained}
    config = None if setting.form == "adam_spd" else config_of(dict.fromkeys(trained, SPD))
    left_out = frozen if only else ()
    training = ZeroTraining(start, SPD, setting, config=config, frozen=frozen, leave_out=left_out)
    held = training.projector.export_anchors()
    assert _without(sum(held[name].piece.numel for name in trained)) == idle
    oracle, pulled = Oracle(live, live, SPD), 0
    arrives = {name: torch.zeros_like(w) for name, w in live.items()}
    for given in _drawn(start, trained):
        training.step(given)
        kept = arrives if setting.stage == 3 else {name: torch.zeros_like(w) for name, w in live.items()}
        arrives = {**kept, **{name: g for name, g in given.items() if name in trained}}
        pulled += sum(one.s != 0 for one in oracle.step(arrives).values())
    compare(training, oracle, live)
    assert pulled >= 1, "the case pulls nothing and shows nothing"
    training.close()


def _cells() -> Iterator[tuple[str, Form, Kind, bool, bool]]:
    """Name, form, kind, `only`, and whether it is slow: quick are the two forms in turn."""
    for k, kind in enumerate(KINDS):
        for only in (True, False):
            for i, form in enumerate(FORMS):
                held = "only" if only else "all"
                yield f"{kind}-{held}-{form}", form, kind, only, i != (k + only) % 2


def tasks(engine: str, world: int) -> Iterator[Task]:
    """Both kinds and both optimizers on an engine; four ranks of the older ones are slow."""
    rare = world == 4 and engine not in ("fsdp1", "fsdp2")
    for name, form, kind, only, slow in _cells():
        idle = (engine, world, kind) not in _SPREAD
        options = {"form": form, "kind": kind, "only": only, "idle": idle}
        yield Task(f"few_trained-{name}", engine, world, few_trained, options, slow=slow or rare)


def zero_tasks(world: int, stage: int) -> Iterator[Task]:
    """The same on a stage of ZeRO."""
    for name, form, kind, only, slow in _cells():
        idle = kind == "trunk"
        setting = Setting(stage=stage, form=form)
        options = {"setting": setting, "kind": kind, "only": only, "idle": idle}
        yield Task(
            f"few_trained-{stage}-{name}", "zero", world, few_trained_zero, options, slow=slow or world == 4
        )
