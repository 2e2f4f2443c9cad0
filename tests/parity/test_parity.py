"""The matrix: engine x world size x case. A cell is one test; one launch per engine and world runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.parity import (
    cases,
    collective_cases,
    disk_cases,
    grown_cases,
    kept_cases,
    part_cases,
    resume_cases,
    rule_cases,
    seam_cases,
    trainable_cases,
)
from tests.reference.golden import FTP_FILES, SPD_FILES
from tests.support.launch import Task
from tests.support.training import FORMS

EXACT = (
    ("single", 1),
    ("ddp", 1),
    ("ddp", 2),
    ("ddp", 4),
    ("fsdp2", 1),
    ("fsdp2", 2),
    ("fsdp2", 4),
    ("hsdp", 4),
    ("fsdp2_tp", 4),
    ("tp", 2),
    ("fsdp2_offload", 2),
)
"""Engines through which gradients arrive to the last bit."""
NO_TP = tuple(cell for cell in EXACT if "tp" not in cell[0])
FSDP2 = (("fsdp2", 2), ("fsdp2", 4))
REPLICATED = (("ddp", 2), ("fsdp2", 2), ("fsdp2", 4), ("hsdp", 4))
SPLIT = {("single", 1): 0, ("ddp", 2): 0, ("fsdp2", 1): 0, ("fsdp2", 2): 1, ("fsdp2", 4): 1, ("hsdp", 4): 1}

Cells = Sequence[tuple[str, int]]


FULL = (("single", 1), ("fsdp2", 2), ("tp", 2))
"""Where both forms of every case are quick; elsewhere the forms take turns, and the rest is slow."""


def _cross(
    cells: Cells,
    function: Callable[..., None],
    *,
    forms: Sequence[str] = FORMS,
    first: int = 0,
    label: str = "",
    **options: Any,
) -> Iterator[Task]:
    """Each cell in each form; `first` is the form that is quick everywhere."""
    name = f"{function.__name__}{label and '-' + label}"
    for cell in cells:
        for i, form in enumerate(forms):
            slow = len(forms) > 1 and cell not in FULL and i != first % 2
            yield Task(f"{name}-{form}", *cell, function, {"form": form, **options}, slow=slow)


def _formless(cells: Cells, function: Callable[..., None], label: str = "", **options: Any) -> Iterator[Task]:
    for engine, world in cells:
        yield Task(f"{function.__name__}{label and '-' + label}", engine, world, function, options)


def _golden() -> Iterator[Task]:
    for stem in SPD_FILES:
        for first, dtype in enumerate((torch.float64, torch.float32)):
            label = f"{stem}-{str(dtype).removeprefix('torch.')}"
            yield from _cross(EXACT, cases.golden, first=first, label=label, stem=stem, dtype=dtype)
        yield from _cross(
            (("fsdp2_mixed", 2),), cases.golden, label=f"{stem}-float32", stem=stem, dtype=torch.float32
        )


def _oracle() -> Iterator[Task]:
    for first, function in enumerate(
        (
            cases.statistics,
            cases.uneven,
            cases.frozen,
            cases.mixed_dtypes,
            cases.rules,
            cases.file_anchor,
            cases.zero_anchor,
            cases.scheduled,
            cases.inert,
        )
    ):
        yield from _cross(EXACT, function, first=first)
    yield from _formless(EXACT, cases.several_optimizers)
    yield from _formless(EXACT, cases.by_pattern)
    for foreach in (False, True):
        yield from _cross(NO_TP, cases.lambda_zero, label=f"foreach{foreach}", foreach=foreach)
    yield from _cross(NO_TP, cases.tied)
    yield from _cross(NO_TP, cases.clipped)
    yield from _cross((("single", 1), *FSDP2, ("fsdp2_tp", 4), ("tp", 2)), cases.max_pull)
    yield from _cross((("single", 1), *FSDP2), cases.thawed)
    yield from _cross(REPLICATED, cases.accumulated)
    yield from _cross((*REPLICATED, ("fsdp2_tp", 4)), cases.eval_between)
    yield from _cross((("fsdp2", 2),), part_cases.sharded_after_the_optimizer_was_built)
    yield from _cross((("tp", 2),), part_cases.unknown_parameter_on_one_rank)
    yield from _formless((("fsdp2", 2),), part_cases.maps_of_a_stage)
    yield from _formless((("fsdp2", 2),), part_cases.maps_of_a_sharded_stage)
    for cell in FSDP2:
        yield from trainable_cases.tasks(*cell)
    for dtype in (torch.float64, torch.float32):
        label = str(dtype).removeprefix("torch.")
        for cell in (("single", 1), ("ddp", 2), *FSDP2, ("hsdp", 4), ("tp", 2), ("fsdp2_offload", 2)):
            yield Task(f"fused-{label}", *cell, cases.fused, {"dtype": dtype})
    for fused in (False, True):
        yield from _cross((("single", 1), *REPLICATED), cases.scaled, label=f"fused{fused}", fused=fused)
    for reshard, forms in ((True, FORMS), (False, ("attached",))):
        yield from _cross(
            (*FSDP2, ("fsdp2_tp", 4)),
            cases.after_eval,
            forms=forms,
            label=f"reshard{reshard}",
            reshard=reshard,
        )
    yield from _cross(FSDP2, cases.shard_dim1)
    for first, rules in enumerate((False, True)):
        label = "rules" if rules else ""
        cells = (("single", 1), ("ddp", 2), ("fsdp2", 2), ("hsdp", 4), ("fsdp2_tp", 4))
        yield from _cross(cells, disk_cases.bit_equal, first=first, label=label, rules=rules)
    yield from _cross((("fsdp2", 2),), disk_cases.bit_equal, label="columns", columns=True)
    yield from _cross((("fsdp2", 2),), grown_cases.resized)
    yield from _cross((("fsdp2_tp", 4),), cases.uneven_strided)
    yield from _cross((("tp", 2),), cases.partial_gradients)
    yield from _cross((("tp", 2),), cases.empty_tp_shard)
    yield from _cross((("fsdp2", 4),), cases.two_meshes)
    yield from _cross(FSDP2, cases.ignored)
    for base in ("sgd", "adamw_foreach", "adamw_fused", "rmsprop"):
        yield from _formless((("single", 1), *REPLICATED), cases.other_bases, base, base=base)
    yield from _formless((("tp", 2), ("fsdp2_tp", 4)), cases.real_block)
    yield from _formless((("single", 1), ("ddp", 2), *FSDP2, ("hsdp", 4)), cases.pre_tensors)
    yield from _formless((("ddp", 2), ("ddp", 4)), cases.ranks_bit_equal)


MESHES = (("hsdp_tp", 8), ("fsdp2_ep", 4), ("fsdp2_odd", 3))
"""A mesh of three axes, parameters on meshes of their own, a number of ranks that is no power of two."""


def _meshes() -> Iterator[Task]:
    """Of eight ranks, which take turns on a few cores, two cases are quick."""
    for task in _all_meshes():
        few = task.world < 8 or task.name.startswith(("uneven", "per_step"))
        yield replace(task, slow=task.slow or not few)


def _all_meshes() -> Iterator[Task]:
    for cell in MESHES:
        for first, function in enumerate((cases.uneven, cases.rules, cases.file_anchor, cases.frozen)):
            yield from _cross((cell,), function, first=first)
        for first, stem in enumerate(("spd_basic", "spd_missing_grads")):
            if cell[0] == "fsdp2_ep":  # no layer there is an expert
                continue
            yield from _cross((cell,), cases.golden, first=first, label=stem, stem=stem, dtype=torch.float64)
        yield from _cross((cell,), resume_cases.same_world, label="file", source="file")
        yield from _cross((cell,), seam_cases.toy_rule, label="row_ball", toy="row_ball")
    for cell, expected in (("hsdp_tp", 8), 2), (("fsdp2_ep", 4), 3), (("fsdp2_odd", 3), 1):
        yield from _cross((cell,), collective_cases.per_step, expected=expected)


def _resume() -> Iterator[Task]:
    for source in ("snapshot", "file"):
        yield from _cross(EXACT, resume_cases.same_world, label=source, source=source)
    yield from _cross((("fsdp2", 4),), resume_cases.resharded)


def _collectives() -> Iterator[Task]:
    for cell, expected in SPLIT.items():
        yield from _cross((cell,), collective_cases.per_step, expected=expected)
    yield from _cross((("fsdp2_tp", 4),), collective_cases.per_step, expected=2)
    yield from _cross((("tp", 2),), collective_cases.per_step, expected=1, partial=1)
    yield from _cross(FSDP2, collective_cases.with_missing_gradients, expected=1)
    yield from _formless((("fsdp2", 4),), collective_cases.naive_form)


def _seam() -> Iterator[Task]:
    for label, rule in kept_cases.RULES.items():
        yield from _cross(EXACT, kept_cases.kept, label=label, rule=rule)
    cells = (("single", 1), ("ddp", 2), *FSDP2, ("hsdp", 4), ("fsdp2_tp", 4), ("tp", 2))
    for toy in seam_cases.TOYS:
        yield from _cross(cells, seam_cases.toy_rule, label=toy, toy=toy)
        yield from _cross(
            (("single", 1), *FSDP2, ("fsdp2_tp", 4)), seam_cases.toy_beside_spd, label=toy, toy=toy
        )
        yield from _cross((("single", 1), *FSDP2), seam_cases.toy_resumes, label=toy, toy=toy)
        yield from _cross((("fsdp2", 4),), seam_cases.toy_resharded, label=toy, toy=toy)
    for toy, beside, expected in (("row_ball", True, 1), ("turn_back", False, 2), ("turn_back", True, 2)):
        label = f"{toy}-beside{beside}"
        options = {"toy": toy, "beside": beside}
        yield from _cross(FSDP2, seam_cases.toy_collectives, label=label, expected=expected, **options)
        yield from _cross((("ddp", 2),), seam_cases.toy_collectives, label=label, expected=0, **options)


def _rules() -> Iterator[Task]:
    """Quick: one process, and one form of a few cells; the launches of four ranks cost the most."""
    quick = {
        "single-1": _RULE_CASES,
        "fsdp2-2": _RULE_CASES,
        "fsdp2-4": ("ftp_golden",),
        "fsdp2_tp-4": ("rule-ftp",),
    }
    for task in _all_rules():
        first = task.options["form"] == ("attached" if "sgd" in task.name else "adam_spd")
        here = first and any(case in task.name for case in quick.get(task.launch, ()))
        yield replace(task, slow=not here)


_RULE_CASES = ("ftp_golden", "rule-", "rule_in_columns-ftp", "rule_in_checkpoints-ftp", "rule_collectives")


def _all_rules() -> Iterator[Task]:
    for stem in FTP_FILES:
        forms = FORMS if "adam" in stem else ("attached",)
        cells = (("single", 1), ("ddp", 2), *FSDP2, ("hsdp", 4), ("fsdp2_tp", 4), ("tp", 2))
        yield from _cross(cells, rule_cases.ftp_golden, forms=forms, label=stem, stem=stem)
    for name in rule_cases.RULES:
        own: dict[str, Any] = {"label": name, "name": name}
        cells = (("single", 1), *FSDP2, ("hsdp", 4), ("fsdp2_tp", 4), ("tp", 2))
        yield from _cross(cells, rule_cases.rule, **own)
        yield from _cross((("fsdp2", 2),), rule_cases.rule_in_columns, forms=["adam_spd"], **own)
        expected = {"cwd": 0, "digrap": 2}.get(name, 1)
        yield from _cross(FSDP2, rule_cases.rule_collectives, expected=expected, **own)
        if name != "cwd":
            yield from _cross((("single", 1), *FSDP2), rule_cases.rule_resumes, **own)
            yield from _cross((("fsdp2", 4),), rule_cases.rule_resharded, **own)
            yield from _cross((("single", 1), *FSDP2), rule_cases.rule_in_checkpoints, **own)


def _quick(tasks: Sequence[Task]) -> Iterator[Task]:
    """Slow is what a quick case shows of the same engine on two ranks, but for some of every kind.

    Of the golden files, two engines that are FSDP2 with something more have two.
    """
    quick = {(task.launch, task.name) for task in tasks if not task.slow}
    for task in tasks:
        fewer = {"ddp-4": "ddp-2", "fsdp2-4": "fsdp2-2"}.get(task.launch)
        if task.launch in ("hsdp-4", "fsdp2_tp-4") and task.name.startswith("golden-"):
            fewer = "fsdp2-2"
        same = (fewer, task.name) in quick and not task.name.startswith(KEPT)
        yield replace(task, slow=task.slow or same)


KEPT = ("uneven", "golden-spd_basic", "golden-spd_missing", "rules", "file_anchor", "per_step", "ranks_bit")
"""Quick on four ranks too: there are uneven and empty shards, layers without a gradient, values of a file."""

TASKS = [
    *_quick([*_golden(), *_oracle()]),
    *_meshes(),
    *_resume(),
    *_collectives(),
    *_seam(),
    *_rules(),
]


@pytest.mark.parametrize("task", [pytest.param(task, id=task.id, marks=task.marks) for task in TASKS])
def test_parity(task: Task, distributed: Callable[[Task], None]) -> None:
    """What the case's function says."""
    distributed(task)
