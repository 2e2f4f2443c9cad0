"""The matrix of FSDP1, fairscale and ZeroRedundancyOptimizer: engine x world size x case."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.parity import (
    cases,
    collective_cases,
    disk_cases,
    grown_cases,
    kept_cases,
    older_cases,
    resume_cases,
    rule_cases,
    seam_cases,
    trainable_cases,
)
from tests.reference.golden import SPD_FILES
from tests.support.launch import Task
from tests.support.training import FORMS

FSDP1 = (("fsdp1", 2), ("fsdp1", 4), ("fsdp1_flat", 2), ("fsdp1_flat", 4))
FSDP1_OTHER = (
    ("fsdp1", 1),
    ("fsdp1_flat", 1),
    ("fsdp1_grad_op", 2),
    ("fsdp1_flat_grad_op", 2),
    ("fsdp1_hybrid", 4),
    ("fsdp1_flat_hybrid", 4),
    ("fsdp1_no_shard", 2),
    ("fsdp1_flat_no_shard", 2),
)
FSDP1_MIXED = (("fsdp1_mixed", 2), ("fsdp1_flat_mixed", 2))
FAIRSCALE = (
    ("fairscale_fsdp", 2),
    ("fairscale_fsdp", 4),
    ("fairscale_fsdp_plain", 2),
    ("fairscale_fsdp_plain", 4),
)
SHARES = (("zero_redundancy", 2), ("zero_redundancy", 4), ("oss", 2), ("oss", 4), ("oss_sharded", 2))

FULL = (("fsdp1", 2), ("fsdp1_flat", 2), ("fairscale_fsdp", 2), ("zero_redundancy", 2), ("oss", 2))
"""Where every case is quick, the two forms in turn; elsewhere those below are, and the rest is slow."""

ALWAYS = ("uneven", "frozen", "frozen_unit", "tied", "rules", "two_groups", "per_step", "spd_basic-float")

EVERYWHERE = (
    "uneven",
    "tied",
    "file_anchor",
    "zero_anchor",
    "inert",
    "eval_between",
    "accumulated",
    "clipped",
)
ONE_BY_ONE = ("rules", "frozen", "scheduled", "by_pattern", "several_optimizers", "max_pull")
"""Cases whose layers differ in what the optimizer is told, which one flat tensor of them cannot."""


def _is_flat(engine: str) -> bool:
    return "flat" in engine or engine == "fairscale_fsdp"


def _fits(engine: str, case: str) -> bool:
    if engine.startswith("fairscale"):  # its clipping asks for CUDA; float32 is no measure of a strong pull
        return case not in ("clipped", "max_pull", "several_optimizers")
    if engine.startswith(("zero", "oss")):  # these make their optimizer themselves; OSS clips in its own way
        return case not in ("by_pattern", "several_optimizers", *(["clipped"] if "sharded" in engine else []))
    return True


def _cross(
    engine: str, world: int, function: Callable[..., None], turn: int, **options: object
) -> Iterator[Task]:
    label = "-".join(str(v).removeprefix("torch.") for v in options.values())
    for i, form in enumerate(FORMS):
        name = "-".join(filter(None, (function.__name__, label, form)))
        quick = (engine, world) in FULL or any(always in name for always in ALWAYS)
        slow = not quick or i != (turn + world) % 2
        yield Task(name, engine, world, function, {"form": form, **options}, slow=slow)


def _golden(engine: str, world: int) -> Iterator[Task]:
    for turn, stem in enumerate(SPD_FILES):
        if _is_flat(engine) and stem == "spd_groups":  # groups of one flat tensor's layers
            continue
        if engine.startswith("fairscale") or "mixed" in engine:
            dtypes = [torch.float32]
        else:
            dtypes = [torch.float64, torch.float32]
        for dtype in dtypes:
            if engine.startswith("fairscale") and stem == "spd_missing_grads":
                continue  # fairscale fails in a unit that a backward leaves out
            yield from _cross(engine, world, cases.golden, turn, stem=stem, dtype=dtype)


def _of(engine: str, world: int) -> Iterator[Task]:
    yield from _golden(engine, world)
    if "mixed" in engine:
        return
    for turn, name in enumerate(EVERYWHERE):
        if _fits(engine, name):
            options = {"idle_unit": False} if name == "uneven" and engine.startswith("fairscale") else {}
            yield from _cross(engine, world, getattr(cases, name), turn, **options)
    for turn, name in enumerate(ONE_BY_ONE):
        if not _fits(engine, name) or _is_flat(engine):
            continue
        if name in ("by_pattern", "several_optimizers"):
            yield Task(name, engine, world, getattr(cases, name))
        else:
            yield from _cross(engine, world, getattr(cases, name), turn)
    if _is_flat(engine):
        for function in (older_cases.rules_in_a_flat, older_cases.two_groups):
            yield Task(function.__name__, engine, world, function)
        yield from _cross(engine, world, older_cases.frozen_unit, 0)
    for turn, source in enumerate(("snapshot", "file")):
        yield from _cross(engine, world, resume_cases.same_world, turn, source=source)
    if not engine.startswith(("zero", "oss")):  # these broadcast in their step: see anchors_of_a_share
        split = 0 if "no_shard" in engine or world == 1 else 1
        yield from _cross(engine, world, collective_cases.per_step, 1, expected=split)
    if not engine.startswith("fairscale"):
        for turn, (label, rule) in enumerate(kept_cases.RULES.items()):
            options = {"form": FORMS[turn], "rule": rule}
            slow = (engine, world) not in FULL
            yield Task(f"kept-{label}", engine, world, kept_cases.kept, options, slow=slow)


def _odd() -> Iterator[Task]:
    """Three ranks: chunks that no power of two divides."""
    for turn, engine in enumerate(("fsdp1_odd", "fsdp1_flat_odd")):
        for name in ("uneven", "file_anchor"):
            yield from _cross(engine, 3, getattr(cases, name), turn)
        for stem in ("spd_basic", "spd_missing_grads"):
            yield from _cross(engine, 3, cases.golden, turn, stem=stem, dtype=torch.float64)


def _tasks() -> Iterator[Task]:
    yield from _odd()
    for engine, world in (*FSDP1, *FSDP1_OTHER, *FSDP1_MIXED, *FAIRSCALE, *SHARES):
        yield from _of(engine, world)
    for engine, world in (*FSDP1, *FAIRSCALE, *SHARES[2:4]):
        yield from trainable_cases.tasks(engine, world)
    for engine, world in FSDP1:
        yield from _cross(engine, world, cases.statistics, world // 4)
        yield Task("checkpoint", engine, world, older_cases.checkpoint)
        for toy in seam_cases.TOYS:
            yield from _cross(engine, world, seam_cases.toy_rule, world // 4, toy=toy)
            yield from _cross(engine, world, seam_cases.toy_resumes, world // 4, toy=toy)
        for turn, name in enumerate(rule_cases.RULES):
            slow = engine != "fsdp1_flat" or world != 2 or name not in ("ftp", "digrap")
            yield Task(
                f"rule-{name}", engine, world, rule_cases.rule, {"form": FORMS[turn % 2], "name": name}, slow
            )
    for engine in ("fsdp1", "fsdp1_flat", "zero_redundancy"):
        yield Task("fused", engine, 2, cases.fused, {"dtype": torch.float64, "mixed": False})
    for engine, world in (*FSDP1, *FAIRSCALE):
        yield Task("anchors_of_a_shard", engine, world, older_cases.anchors_of_a_shard)
    for engine, world in (("fsdp1", 2), ("fsdp1_flat", 2), ("fairscale_fsdp", 2)):
        yield Task("without_model", engine, world, older_cases.without_model)
    for turn, engine in enumerate(("fsdp1", "fsdp1_flat", "fairscale_fsdp", "zero_redundancy")):
        yield from _cross(engine, 2, disk_cases.bit_equal, turn)
    for turn, engine in enumerate(("fsdp1", "fsdp1_flat")):
        yield from _cross(engine, 2, grown_cases.resized, turn)
    yield Task("sharded_after_binding", "fsdp1", 2, older_cases.sharded_after_binding)
    yield Task("channels_last", "fsdp1", 2, older_cases.channels_last)
    yield Task("ignored", "fsdp1", 2, older_cases.ignored)
    for engine, world in SHARES:
        yield Task("anchors_of_a_share", engine, world, older_cases.anchors_of_a_share)
        yield Task("other_anchor_raises", engine, world, older_cases.other_anchor_raises)
        yield Task("same_fingerprint", engine, world, older_cases.same_fingerprint)
    for engine, world in (("zero_redundancy", 2), ("oss", 2)):
        yield Task("pre_lists", engine, world, older_cases.pre_lists)
        yield Task("lists_of_another_length", engine, world, older_cases.lists_of_another_length)
        yield from _cross(engine, world, older_cases.group_added, 0)
        yield Task("pattern_of_another_rank", engine, world, older_cases.pattern_of_another_rank)
        yield Task("few_layers", engine, world, older_cases.few_layers)
        yield Task("two_shares", engine, world, older_cases.two_shares)
    yield Task("overlap_with_ddp", "zero_redundancy", 2, older_cases.overlap_with_ddp)
    yield Task("lost_buckets", "oss_sharded", 2, older_cases.lost_buckets)


@pytest.mark.parametrize("task", [pytest.param(task, id=task.id, marks=task.marks) for task in _tasks()])
def test_older_engine(task: Task, distributed: Callable[[Task], None]) -> None:
    """What the case's function says."""
    distributed(task)
