"""No rank of a job ever holds the whole model where the engine reads shards."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.job.commands import ROOT, environment
from tests.job.models import save_llama, write_texts
from tests.job.test_causal_lm import engine_setting

MIB = 2**20
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Memory that is given up goes back to the system, so that cases do not live off one another's."""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_read_their_shards_only(tmp_path: Path) -> None:
    wide = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10}
    save_llama(tmp_path / "llama", **wide, num_key_value_heads=4)
    size = (tmp_path / "llama" / "model.safetensors").stat().st_size
    assert size > 200 * MIB
    save_llama(tmp_path / "small")
    text = str(write_texts(tmp_path / "a.jsonl", 3, seed=0))
    job: dict[str, object] = {"task": "causal-lm", "checkpoint": str(tmp_path / "llama"), "device": "cpu"}
    job |= {"data": {"train": text, "test": text}, "train": {"max_grad_norm": 1.0}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    measured = {name: [engine_setting(name)] for name in ("fsdp2", "zero3")}
    measured["whole"] = [engine_setting("fsdp2"), "load=whole"]
    # First a small model, so that what is imported and made once is not counted.
    small = f"checkpoint={tmp_path / 'small'}"
    cases = {f"small-{name}": [*settings, small] for name, settings in measured.items()} | measured
    worker = str(ROOT / "tests" / "memory" / "loading_worker.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, worker, str(tmp_path / "job.yaml"), str(tmp_path), json.dumps(cases)],
        env={**environment(tmp_path), "OMP_NUM_THREADS": "1", **RETURNED},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        grown = json.loads((tmp_path / f"grown-{rank}.json").read_text())
        assert grown["whole"] > 0.9 * size  # so that the measure can tell
        # A half, the largest tensor, what the engine makes once, and the allocator's rests.
        assert grown["fsdp2"] < size / 2 + 48 * MIB, grown
        assert grown["zero3"] < size / 2 + 64 * MIB, grown
