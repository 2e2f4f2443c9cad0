"""Bad input on several ranks: a clear error on every rank, and no rank waits for another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.contract import anchor_cases, cases, checkpoint_cases, precision_cases, step_cases, step_path_cases
from tests.support.launch import Task
from tests.support.training import FORMS

SHARDED = (("fsdp2", 2), ("fsdp2", 4))
ENGINES = (("ddp", 2), *SHARDED)


def _tasks(
    cells: Sequence[tuple[str, int]], function: Callable[..., None], forms: Sequence[str] = (), **options: Any
) -> Iterator[Task]:
    for cell in cells:
        for form in forms:
            yield Task(f"{function.__name__}-{form}", *cell, function, {"form": form, **options})
        if not forms:
            label = "".join(f"-{str(value).removeprefix('torch.')}" for value in options.values())
            yield Task(f"{function.__name__}{label}", *cell, function, options)


def _all() -> Iterator[Task]:
    for function in (
        cases.file_missing_on_one_rank,
        cases.file_truncated_on_one_rank,
        cases.file_of_another_model,
        cases.unbound,
        cases.swapped,
        cases.another_anchor_on_resume,
        cases.unknown_rule,
    ):
        yield from _tasks(ENGINES, function, FORMS)
    for rule in ("spd", "l2sp"):
        cells = (*SHARDED, ("fsdp2_tp", 4), ("fsdp1_flat", 2))
        yield from _tasks(cells, cases.file_on_disk_changed_on_one_rank, rule=rule)
    for function in (cases.pattern_of_nothing, cases.negative_lambda, cases.pre_of_another_length):
        yield from _tasks(ENGINES, function)
    for function in (cases.loaded_after_snapshot, cases.nan_on_one_rank):
        yield from _tasks((*SHARDED, ("fsdp2_tp", 4), ("hsdp", 4)), function, FORMS)
    yield from _tasks((("hsdp", 4), ("fsdp2_tp", 4)), cases.file_missing_on_one_rank, FORMS)
    for function in (cases.thawed_between_bindings, cases.frozen_layer_loaded_on_one_rank):
        yield from _tasks((*SHARDED, ("fsdp2_tp", 4)), function, FORMS)
    for function in (cases.fine_tuned_weights_taken_for_pre_trained, cases.moved_while_lambda_was_zero):
        yield from _tasks((*SHARDED, ("fsdp1_flat", 2)), function)
    yield from _tasks((("fsdp2", 4),), cases.more_ranks_than_rows, FORMS)
    for cell in (("fsdp2", 2), ("hsdp", 4), ("fsdp1", 2)):
        yield from _tasks((cell,), cases.parameters_that_one_rank_lacks)
    flat = (("fsdp1", 2), ("fsdp1_flat", 2))
    for turn, function in enumerate(
        (
            cases.file_missing_on_one_rank,
            cases.file_truncated_on_one_rank,
            cases.file_of_another_model,
            cases.unbound,
            cases.swapped,
            cases.another_anchor_on_resume,
            cases.loaded_after_snapshot,
            cases.nan_on_one_rank,
        )
    ):
        yield from _tasks(flat, function, FORMS[turn % 2 :][:1])
    yield from _tasks((("fsdp1_hybrid", 4),), cases.file_missing_on_one_rank, FORMS[:1])
    yield from _tasks(flat[:1], cases.thawed_between_bindings, FORMS)
    yield from _tasks(flat[:1], cases.frozen_layer_loaded_on_one_rank, FORMS)
    for cell in (("zero_redundancy", 2), ("oss", 2)):
        for function in (cases.file_missing_on_one_rank, cases.file_truncated_on_one_rank):
            yield from _tasks((cell,), function, FORMS)
    pairs = (("fsdp2", 2), ("fsdp1", 2))
    for rank in (0, 1):
        yield from _tasks(pairs, anchor_cases.one_corrupted_byte, FORMS[rank:][:1], manifest_on=rank)
    for function in (anchor_cases.swapped_tensors, anchor_cases.not_at_its_anchor):
        yield from _tasks(pairs, function, FORMS)
    yield from _tasks(pairs, anchor_cases.expected_fingerprint)
    yield from _tasks((("zero_redundancy", 2),), anchor_cases.expected_fingerprint_of_a_layer_of_one_rank)
    for rule in ("spd", "l2sp", "ftp", "digrap"):
        yield from _tasks((("fsdp2", 2), ("tp", 2)), step_cases.deferred_optimizer_steps_twice, rule=rule)
    for function in (step_cases.base_that_raises, step_cases.step_that_fails_leaves_the_next_one_whole):
        yield from _tasks((*SHARDED, ("fsdp2_tp", 4), ("fsdp1", 2)), function)
    yield from _tasks((*SHARDED, ("fsdp2_tp", 4), ("fsdp1", 2)), step_cases.scalars_that_differ, FORMS)
    for function in (step_cases.kernels_that_one_rank_lacks, step_cases.rank_without_a_share):
        yield from _tasks((("ddp", 2),), function)
    for function in (step_cases.group_that_one_rank_has, step_cases.failure_that_is_heard_late):
        yield from _tasks(SHARDED, function)
    yield from _tasks((("fsdp2", 2), ("fsdp1", 2)), checkpoint_cases.one_rank_alone)
    yield from _tasks((("ddp", 2), ("fsdp2", 2)), checkpoint_cases.telemetry_of_one_rank)
    for function in (
        checkpoint_cases.export_that_one_rank_cannot,
        checkpoint_cases.background_save_that_cannot_start,
        checkpoint_cases.scaler_skips_a_step,
    ):
        yield from _tasks((("fsdp2", 2),), function)
    yield from _tasks((("fsdp2", 4),), checkpoint_cases.model_on_part_of_the_ranks)
    cells = (("ddp", 2), ("fsdp2", 4), ("fsdp1", 2))
    yield from _tasks(cells, checkpoint_cases.activation_rate_counts_the_same_layers)
    cells = (("zero_redundancy", 2),)
    yield from _tasks(cells, checkpoint_cases.activation_rate_counts_the_same_layers, shares=True)
    yield from _tasks((("fsdp2", 2),), step_path_cases.few_modules, modules=12, moves=70)
    for dtype, lr in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
        yield from _tasks(
            (("single", 1), *SHARDED), precision_cases.ratio_of_a_large_layer, dtype=dtype, lr=lr
        )


def _quick(tasks: Sequence[Task]) -> Iterator[Task]:
    """On four ranks one form of a case is quick where both are on two."""
    quick = {(task.launch, task.name) for task in tasks if not task.slow}
    for task in tasks:
        same = task.launch == "fsdp2-4" and ("fsdp2-2", task.name) in quick
        yield replace(task, slow=task.slow or (same and task.name.endswith("-attached")))


TASKS = [*_quick([*_all()])]


@pytest.mark.parametrize("task", [pytest.param(task, id=task.id, marks=task.marks) for task in TASKS])
def test_contract(task: Task, distributed: Callable[[Task], None]) -> None:
    """What the case's function says."""
    distributed(task)
