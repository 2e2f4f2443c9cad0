"""Reading an anchor takes the shard and at most 64 MiB more, measured on 1 GiB at four ranks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.memory.anchor_worker import MIB, PERIOD, SHAPES

ROOT = Path(__file__).parents[2]
WORLD = 4
# Twenty seconds alone on two cores; a busy machine is given time.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Iterator[Path]:
    """Four files of 256 MiB and their index; removed afterwards, since pytest keeps its folders."""
    folder = tmp_path_factory.mktemp("checkpoint")
    weight_map = {}
    for number, (name, shape) in enumerate(SHAPES.items(), 1):
        file = f"model-{number:05}-of-{len(SHAPES):05}.safetensors"
        values = torch.arange(1 << 26, dtype=torch.int32).remainder_(PERIOD).float().view(shape)
        save_file({name: values}, folder / file)
        weight_map[name] = file
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) > 1024 * MIB
    yield index
    shutil.rmtree(folder)


def measure(checkpoint: Path, ranks: range, how: str) -> list[dict]:
    """Run the ranks side by side, each in a fresh process, and collect what they print."""
    command = [sys.executable, "-m", "tests.memory.anchor_worker", str(checkpoint)]
    started = [
        subprocess.Popen([*command, str(rank), str(WORLD), how], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in ranks
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started)
    return [json.loads(output) for output in outputs]


def test_each_rank_takes_its_shard_and_at_most_64_mib(checkpoint):
    results = measure(checkpoint, range(WORLD), "sliced")
    assert sum(result["shard"] for result in results) == 1024 * MIB
    for rank, result in enumerate(results):
        assert result["correct"], f"rank {rank} read wrong values"
        beyond = (result["increase"] - result["shard"]) / MIB
        print(f"rank {rank}: shard {result['shard'] / MIB:.1f} MiB, beyond it {beyond:.1f} MiB at the peak")
        assert beyond <= 64


def test_the_measure_notices_a_rank_that_reads_everything(checkpoint):
    """The control: without it a measure that always shows little would pass above."""
    (result,) = measure(checkpoint, range(1), "whole")
    assert result["increase"] - result["shard"] > 64 * MIB


def test_interpolation_holds_a_chunk_at_a_time(checkpoint, tmp_path):
    """256 MiB of one tensor, between itself and itself."""
    file = sorted(checkpoint.parent.glob("*.safetensors"))[0]
    command = [sys.executable, "-m", "tests.memory.interpolate_worker", str(file), str(file)]
    done = subprocess.run(
        [*command, str(tmp_path / "mixed")], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    result = json.loads(done.stdout)
    assert result["written"] == 256 * MIB
    assert result["increase"] <= 64 * MIB
    assert torch.equal(load_file(tmp_path / "mixed" / file.name)["rows"], load_file(file)["rows"])
    shutil.rmtree(tmp_path / "mixed")
