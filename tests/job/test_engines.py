"""The real command under every engine: the same training, and a checkpoint that loads elsewhere."""

import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from sharded_spd.finetune.world import free_port
from tests.job.commands import COMMAND, ROOT, environment, finished, metrics, results
from tests.support.warm import python

RANKS = {
    "single": 1,
    "ddp": 2,
    "fsdp2": 2,
    "zero1": 2,
    "zero2": 2,
    "zero3": 2,
    "fsdp1": 2,
    "zero-redundancy": 2,
    "fairscale-oss": 2,
}
VARIANTS = {
    "fsdp1-flat": "{name: fsdp1, use_orig_params: false, blocks: [ViTLayer]}",
    "fsdp1-grad-op": "{name: fsdp1, sharding_strategy: shard_grad_op}",
    "oss-sharded": "{name: fairscale-oss, sharded_ddp: true}",
    "fairscale-fsdp": "{name: fairscale-fsdp, blocks: [ViTLayer]}",
}
OFFLOAD = ("zero1_offload", "zero2_offload", "zero3_offload")
LAUNCHERS = {"zero2": "deepspeed.sh", "zero3": "accelerate.sh", "fsdp1": "torchrun.sh"}
SLOW = ("zero1", "zero-redundancy", "fairscale-oss")
"""Engines that differ from others in what the parity tests see too."""
ENGINES = [name for name in RANKS if name not in SLOW]
MORE = [pytest.param(name, marks=pytest.mark.slow) for name in (*SLOW, *OFFLOAD, *VARIANTS)]
ON_CPU = ROOT / "tests" / "support" / "fairscale_on_cpu"
"""Its `sitecustomize` makes every Python process run fairscale's FSDP without a GPU."""

SCORE = """
import sys, torch
from transformers import AutoModelForImageClassification
from sklearn.datasets import load_digits
digits = load_digits()
test = torch.randperm(1797, generator=torch.Generator().manual_seed(0))[1600:]
pixels = torch.tensor(digits.images, dtype=torch.float32)[test].unsqueeze(1) / 8 - 1
for directory in sys.argv[1:]:
    model = AutoModelForImageClassification.from_pretrained(directory)
    right = model(pixel_values=pixels).logits.argmax(-1) == torch.tensor(digits.target)[test]
    print(100 * right.double().mean().item())
"""


@pytest.fixture(scope="module")
def run(home: Path, tiny_job: Path) -> Callable[[str], Path]:
    @cache
    def start(engine: str) -> Path:
        out = home / f"run-{engine}"
        settings = [f"ranks={RANKS.get(engine, 2)}", f"output_dir={out}"]
        if engine in VARIANTS:
            settings.append(f"engine={VARIANTS[engine]}")
        elif engine in OFFLOAD or engine in ("zero1", "zero2", "zero3"):
            file = ROOT / "configs" / "deepspeed" / f"{engine}.json"
            settings.append(f"engine={{name: deepspeed, config: {file}}}")
        else:
            settings.append(f"engine={engine}")
        command = COMMAND
        if engine in LAUNCHERS:
            command = [str(ROOT / "launch" / LAUNCHERS[engine]), "2"]
        extra = {"PYTHONPATH": f"{ON_CPU}:{ROOT}"} if engine == "fairscale-fsdp" else {}
        if engine in LAUNCHERS:
            extra = {"MASTER_PORT": free_port()}  # another test may have a job on the launchers' default one
        finished(str(tiny_job), *settings, cache=home, command=command, extra=extra)
        return out

    return start


@pytest.mark.parametrize("engine", [*ENGINES[1:], *MORE])
def test_engines_train_alike(engine: str, run: Callable[[str], Path]) -> None:
    expected, got = metrics(run("single"), "step"), metrics(run(engine), "step")
    assert [(s["method"], s["step"]) for s in got] == [("adamw", 1), ("adamw", 2), ("spd", 1), ("spd", 2)]
    # The order of float32 sums differs between engines; a wrong average is off by over 1e-2.
    assert [s["loss"] for s in got] == pytest.approx([s["loss"] for s in expected], abs=1e-4)
    # The norm before clipping: adamw's and spd's first step begin alike.
    norms = [s["grad_norm"] for s in expected]
    assert [s["grad_norm"] for s in got] == pytest.approx(norms, rel=1e-3)
    assert norms[0] == norms[2] > 1
    moved, reference = metrics(run(engine), "layers"), metrics(run("single"), "layers")
    assert [entry["method"] for entry in moved] == ["adamw", "adamw", "spd", "spd"]
    if engine in RANKS:  # the others have several layers in one flat parameter
        for mine, theirs in zip(moved, reference, strict=True):
            assert list(mine["layers"]) == list(theirs["layers"])
            for name, layer in mine["layers"].items():
                if name.endswith("k_proj.bias"):  # nothing depends on it: its gradient is rounding
                    continue
                assert layer == pytest.approx(theirs["layers"][name], rel=1e-3, abs=1e-6)
    for mine, theirs in zip(
        results(run(engine))["trainings"], results(run("single"))["trainings"], strict=True
    ):
        assert mine["deviation"] == pytest.approx(theirs["deviation"], rel=1e-3)
        assert mine["history"][0]["scores"] == pytest.approx(theirs["history"][0]["scores"])


def test_spd_starts_like_adamw_and_then_stays_closer(run: Callable[[str], Path]) -> None:
    steps = metrics(run("fsdp2"), "step")
    assert steps[0]["loss"] == steps[2]["loss"]
    assert steps[3]["activation_rate"] > 0
    adamw, spd = results(run("fsdp2"))["trainings"]
    assert 0 < spd["deviation"] < adamw["deviation"]


@pytest.mark.parametrize("engines", [ENGINES, pytest.param(SLOW, marks=pytest.mark.slow)])
def test_saved_checkpoints_load_elsewhere_and_score_the_same(
    engines: list[str], run: Callable[[str], Path], home: Path
) -> None:
    trained = [training for engine in engines for training in results(run(engine))["trainings"]]
    done = subprocess.run(
        [python("job"), "-c", SCORE, *(training["checkpoint"] for training in trained)],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    reported = [training["history"][-1]["scores"]["test"] for training in trained]
    assert [float(line) for line in done.stdout.splitlines()] == pytest.approx(reported)


def test_run_leaves_its_files_and_another_does_not_touch_them(
    run: Callable[[str], Path], tiny_job: Path, home: Path
) -> None:
    first = run("single")
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}
    assert {"metrics.jsonl", "results.json", "id_ood.png", "config.json"} <= {path.name for path in before}
    assert (first / "id_ood.png").read_bytes().startswith(b"\x89PNG")
    finished(str(tiny_job), f"output_dir={first}", "compare=spd", "save=none", cache=home)
    second = first.with_name("run-single-2")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not (second / "checkpoints").exists()
    again = [s["loss"] for s in metrics(second, "step")]
    assert again == [s["loss"] for s in metrics(first, "step") if s["method"] == "spd"]  # to the last bit


def test_torchrun_brings_its_own_ranks(tiny_job: Path, home: Path, run: Callable[[str], Path]) -> None:
    out = home / "run-torchrun"
    launcher = [str(ROOT / "launch" / "torchrun.sh"), "2"]
    # Two ranks are given, so `ranks` is not asked.
    output = finished(
        str(tiny_job),
        "engine=@" + str(ROOT / "configs" / "engines" / "fsdp2.yaml"),
        "ranks=1",
        f"output_dir={out}",
        cache=home,
        command=launcher,
    )
    assert output.count("in distribution (ID)") == 1  # one rank speaks
    assert [s["loss"] for s in metrics(out, "step")] == [s["loss"] for s in metrics(run("fsdp2"), "step")]
