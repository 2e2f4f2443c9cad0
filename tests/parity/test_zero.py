"""DeepSpeed: stage x dtype x offload x groups; one launch per world size runs all its cases."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.parity import disk_cases, rule_cases, trainable_cases, zero_rule_cases
from tests.parity import zero_cases as cases
from tests.parity import zero_odd_cases as odd
from tests.parity import zero_seen_cases as seen
from tests.reference.golden import SPD_FILES
from tests.support.launch import Task, run_tasks
from tests.support.zero import OFFLOAD, Setting

PARAMS = {**OFFLOAD, "offload_param": {"device": "cpu"}}
SUB = {"sub_group_size": 20}
MASTERS = {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
WORLDS = (2, 4)
OLD = version("deepspeed").startswith("0.16.")
SKIPS = ("fp16",) if OLD else ("fp32", "bf16", "fp16")
"""Precisions in which DeepSpeed skips a step that overflows."""


def _task(
    function: Callable[..., None], label: str, world: int, *, slow: bool = False, **options: Any
) -> Task:
    return Task(f"{function.__name__}-{label}", "zero", world, function, options, slow=slow)


def _settings() -> Iterator[tuple[str, Setting, bool]]:
    """All combinations; those that are quick at 2 ranks, where each value occurs at least once."""
    quick = {
        "1-fp32",
        "2-bf16-cpu",
        "2-fp16",
        "3-fp32-sub",
        "3-bf16",
        "3-fp16-cpu",
        "3-fp32-params",
        "1-bf16_opt",
    }
    for stage in (1, 2, 3):
        offloads: dict[str, Any] = {"": {}, "-cpu": OFFLOAD}
        if stage == 3:
            offloads |= {"-params": PARAMS, "-sub": SUB, "-sub-cpu": {**SUB, **OFFLOAD}}
        for dtype in ("fp32", "bf16", "fp16"):
            for label, zero in offloads.items():
                name = f"{stage}-{dtype}{label}"
                yield name, Setting(stage=stage, dtype=dtype, zero=zero), name in quick
    yield "1-bf16_opt", Setting(stage=1, dtype="bf16_opt"), True


def _matrix() -> Iterator[Task]:
    for name, setting, quick in _settings():
        for world in WORLDS:
            for grouped in (False, True):
                label = f"{name}{'-groups' if grouped else ''}"
                slow = not quick or (world == 4) == grouped
                yield _task(cases.agrees, label, world, setting=setting, grouped=grouped, slow=slow)
    variants = {
        "round_robin": Setting(stage=2, zero={"round_robin_gradients": True}),
        "overlap": Setting(stage=2, zero={"overlap_comm": True, "contiguous_gradients": True}),
        "accumulated": Setting(stage=2, accumulate=2),
        "accumulated3": Setting(stage=3, accumulate=2),
        "init": Setting(stage=3, init=True),
        "init-bf16": Setting(stage=3, dtype="bf16", init=True),
        "persistent": Setting(stage=3, zero={"stage3_param_persistence_threshold": 10}),
        "hpz": Setting(stage=3, zero={"zero_hpz_partition_size": 2}),
        "whole": Setting(stage=0),
        "whole-bf16": Setting(stage=0, dtype="bf16"),
        "adam_spd-0": Setting(stage=0, form="adam_spd"),
        "adam_spd-2": Setting(stage=2, form="adam_spd"),
        "adam_spd-2-cpu": Setting(stage=2, form="adam_spd", zero=OFFLOAD),
        "adam_spd-3-init": Setting(stage=3, form="adam_spd", init=True),
        "adam_spd-3-bf16": Setting(stage=3, dtype="bf16", form="adam_spd", zero=SUB),
    }
    for label, setting in variants.items():
        for world in WORLDS:
            grouped = label not in ("whole-bf16", "adam_spd-0")
            yield _task(cases.agrees, label, world, setting=setting, grouped=grouped, slow=world == 4)
    yield _task(cases.agrees, "one_rank", 1, setting=Setting(stage=2, dtype="bf16"), grouped=True)
    yield _task(cases.agrees, "one_rank3", 1, setting=Setting(stage=3, zero=SUB), grouped=True)


def _others() -> Iterator[Task]:
    for world in WORLDS:
        for stage in (1, 2, 3):
            one = Setting(stage=stage)
            slow = (world == 4) == (stage != 3)
            for stem in SPD_FILES:
                yield _task(
                    cases.golden, f"{stage}-{stem}", world, setting=one, stem=stem, slow=stage == 1 or slow
                )
            yield _task(cases.agrees, f"{stage}-file", world, setting=one, grouped=True, file=True, slow=slow)
            yield _task(disk_cases.bit_equal_zero, f"{stage}", world, setting=one, slow=slow)
            yield _task(cases.anchors, f"{stage}", world, setting=one, slow=slow)
            yield _task(cases.anchors, f"{stage}-bf16", world, setting=Setting(stage=stage, dtype="bf16"))
            sub = Setting(stage=stage, zero={"sub_group_size": 5} if stage == 3 else {})
            inner = 5 if stage == 3 else 3
            yield _task(cases.collectives, f"{stage}", world, setting=sub, inner_steps=inner)
            for dtype in ("fp32", "bf16", "fp16"):
                own, label = Setting(stage=stage, dtype=dtype), f"{stage}-{dtype}"
                yield _task(cases.resumes, label, world, setting=own, slow=slow or dtype == "fp16")
                if dtype in SKIPS:
                    late = slow and dtype != "fp16"
                    yield _task(cases.overflows, label, world, setting=own, slow=late)
            yield _task(cases.frozen_and_tied, f"{stage}", world, setting=one, slow=slow)
            yield _task(cases.clipped, f"{stage}", world, setting=Setting(stage=stage, clip=1.0), slow=slow)
            yield _task(cases.settings_in_json, f"{stage}", world, setting=one, slow=slow)
            yield _task(cases.of_pattern, f"{stage}", world, setting=one, slow=slow)
            yield _task(cases.other_base, f"{stage}-SGD", world, setting=one, name="SGD", slow=slow)
        opt = Setting(stage=1, dtype="bf16_opt")
        if "bf16" in SKIPS:
            yield _task(cases.overflows, "bf16_opt", world, setting=opt, slow=world == 4)
        yield _task(cases.resumes, "bf16_opt", world, setting=opt, slow=world == 4)
        yield _task(cases.resumes, "whole", world, setting=Setting(stage=0), slow=world == 4)
        yield _task(cases.anchors, "bf16_opt", world, setting=opt, slow=world == 2)
        for stage in (2, 3):
            low = Setting(stage=stage, dtype="bf16", top=MASTERS)
            yield _task(cases.master_weights, f"{stage}", world, setting=low, slow=world == 4)


def _odd() -> Iterator[Task]:
    for stage in (1, 2):
        yield _task(odd.experts, f"{stage}", 4, stage=stage, slow=stage == 1)
    for stage in (1, 3):
        if not (OLD and stage == 3):  # its accessors do not know such partitions
            yield _task(odd.sequence_parallel, f"{stage}", 4, stage=stage)
        yield _task(odd.moved_attributes, f"{stage}", 2, stage=stage)
        yield _task(odd.late_weights, f"{stage}", 2, setting=Setting(stage=stage))
    yield _task(odd.wrong_targets, "", 2)
    yield _task(odd.refusals, "", 2)
    if not OLD:  # which does not know torch_autocast
        yield replace(_task(odd.autocast, "", 2), engine="zero_autocast")


def _has_libaio() -> bool:
    try:
        ctypes.CDLL("libaio.so.1")
    except OSError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    not _has_libaio(), reason="DeepSpeed's NVMe offload needs libaio (apt install libaio-dev)"
)
@pytest.mark.parametrize("file", [False, True])
def test_optimizer_on_nvme(file: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles DeepSpeed's async_io the first time, which takes minutes."""
    monkeypatch.setattr("tests.support.launch.TASK_LIMIT", 600)
    task = Task("nvme", "zero", 2, odd.nvme, {"file": file})
    outcomes = run_tasks([task])
    assert not any(outcomes.values()), outcomes[task.id]


def _seen() -> Iterator[Task]:
    """What rounds, clips, accumulates or communicates otherwise; all quick at 2 ranks."""
    static = {"fp16": {"loss_scale": 8}}
    sums = {"data_types": {"grad_accum_dtype": "fp32"}}
    predivided = {"prescale_gradients": True, "gradient_predivide_factor": 2.0}
    both = {"accumulate": 2, "clip": 1.0}
    hpz = {"zero_hpz_partition_size": 2, "overlap_comm": True}
    one_by_one = {"contiguous_gradients": False, "round_robin_gradients": True}
    settings = {
        "1-bf16": Setting(stage=1, dtype="bf16"),
        "1-bf16_opt-both": Setting(stage=1, dtype="bf16_opt", **both),
        "1-fp16-static": Setting(stage=1, dtype="fp16", top=static),
        "1-all_reduce": Setting(stage=1, zero={"reduce_scatter": False, "contiguous_gradients": False}),
        "2-bf16-both": Setting(stage=2, dtype="bf16", **both),
        "2-bf16-cpu-clip": Setting(stage=2, dtype="bf16", clip=1.0, zero=OFFLOAD),
        "2-bf16-sums": Setting(stage=2, dtype="bf16", top=sums, accumulate=2),
        "2-bf16-round_robin": Setting(stage=2, dtype="bf16", zero=one_by_one),
        "2-bf16-buckets": Setting(
            stage=2, dtype="bf16", zero={"overlap_comm": True, "reduce_bucket_size": 32}
        ),
        "2-fp16-both": Setting(stage=2, dtype="fp16", **both),
        "2-predivided": Setting(stage=2, zero={"reduce_scatter": False}, top=predivided),
        "3-bf16-sub": Setting(stage=3, dtype="bf16", zero=SUB),
        "3-bf16-params-both": Setting(stage=3, dtype="bf16", zero=PARAMS, **both),
        "3-bf16-sums": Setting(stage=3, dtype="bf16", top=sums, accumulate=2),
        "3-bf16-hpz": Setting(stage=3, dtype="bf16", zero=hpz),
        "3-fp16-static-clip": Setting(stage=3, dtype="fp16", clip=1.0, top=static),
    }
    for i, (label, setting) in enumerate(settings.items()):
        for world in WORLDS:
            for per_step in (False, True):
                slow = world == 4 or per_step != (i % 2 == 1)
                name = f"{label}{'-per-step' if per_step else ''}"
                options = {"setting": setting, "grouped": True, "per_step": per_step}
                yield _task(seen.agrees_with_what_arrives, name, world, slow=slow, **options)


def _kernels() -> Iterator[Task]:
    fused = {
        "0": Setting(stage=0),
        "0-bf16": Setting(stage=0, dtype="bf16"),
        "1-bf16_opt": Setting(stage=1, dtype="bf16_opt"),
        "2-bf16": Setting(stage=2, dtype="bf16"),
        "3": Setting(stage=3),
    }
    offloaded = {
        "1": Setting(stage=1, zero=OFFLOAD),
        "2-bf16": Setting(stage=2, dtype="bf16", zero=OFFLOAD),
        "3-bf16-sub": Setting(stage=3, dtype="bf16", zero={**SUB, **OFFLOAD}),
    }
    for kind, settings in (("FusedAdam", fused), ("DeepSpeedCPUAdam", offloaded)):
        for label, setting in settings.items():
            for world in WORLDS:
                options = {"setting": setting, "kind": kind}
                task = _task(seen.kernel_base, f"{label}-{kind}", world, slow=True, **options)
                yield replace(task, engine="zero_kernels")


def _rules() -> Iterator[Task]:
    for stage in (1, 2, 3):
        for name in rule_cases.RULES:
            for per_step in (False, True):
                label = f"{stage}-{name}{'-per-step' if per_step else ''}"
                setting = Setting(stage=stage)
                yield _task(
                    zero_rule_cases.rule, label, 2, setting=setting, name=name, per_step=per_step, slow=True
                )


def _few_trained() -> Iterator[Task]:
    for world in WORLDS:
        for stage in (1, 2, 3):
            yield from trainable_cases.zero_tasks(world, stage)


TASKS = [*_matrix(), *_others(), *_odd(), *_seen(), *_rules(), *_few_trained()]
KERNEL_TASKS = list(_kernels())


@pytest.mark.parametrize("task", [pytest.param(task, id=task.id, marks=task.marks) for task in TASKS])
def test_zero(task: Task, distributed: Callable[[Task], None]) -> None:
    """What the case's function says."""
    distributed(task)


@pytest.fixture(scope="module")
def kernels() -> None:
    """DeepSpeed's kernels for the CPU, compiled where they are not yet: longer than a rank may take."""
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    if shutil.which("ninja", path=path) is None or shutil.which("g++", path=path) is None:
        pytest.skip("DeepSpeed compiles its optimizers with g++ and ninja")
    build = "from deepspeed.accelerator import get_accelerator as accelerator\n" + "\n".join(
        f"accelerator().create_op_builder({name!r}).load()" for name in ("FusedAdamBuilder", "CPUAdamBuilder")
    )
    environment = {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", build]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("task", [pytest.param(t, id=t.id, marks=t.marks) for t in KERNEL_TASKS])
def test_kernel_base(task: Task, distributed: Callable[[Task], None]) -> None:
    """What the case's function says."""
    distributed(task)


@pytest.mark.timeout(120)
def test_the_deepspeed_launcher_starts_the_same(tmp_path: Path) -> None:
    """`deepspeed --num_gpus 2`, as users start it."""
    root = Path(__file__).resolve().parents[2]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    command = [
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        "2",
        "--master_port",
        port,
        "--module",
        "tests.parity.under_launcher",
    ]
    kept = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path)],
        cwd=root,
        env={**kept, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert done.stdout.count("agrees: stage") == 3
    assert "settings in the JSON" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("saved", "loaded"), [(2, 4), (4, 2)])
def test_universal_checkpoint_resumes_at_another_world_size(
    stage: int, saved: int, loaded: int, tmp_path: Path
) -> None:
    """Through DeepSpeed's own converter."""
    options = {"setting": Setting(stage=stage, zero=SUB if stage == 3 else {}), "folder": str(tmp_path)}
    save = Task("save", "zero", saved, cases.saves_for_universal, options)
    load = Task("load", "zero", loaded, cases.loads_universal, options)
    outcomes = run_tasks([save])
    assert not any(outcomes.values()), outcomes[save.id]
    converter = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    folders = ["--input_folder", str(tmp_path / "t"), "--output_folder", str(tmp_path / "universal")]
    done = subprocess.run([*converter, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = run_tasks([load])
    assert not any(outcomes.values()), outcomes[load.id]
