"""The benchmark of ZeRO-3's memory, on a small model: anchors of at most 2 bytes per parameter / ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(180)
def test_anchor_of_a_bfloat16_model_costs_two_bytes_per_parameter_and_rank(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    script = ROOT / "benchmarks" / "zero3_memory.py"
    done = subprocess.run(
        [sys.executable, str(script), "--parameters", "2000000", "--json", str(out)],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())["results"]
    for anchor in ("snapshot", "file"):
        share = 2 * found[anchor]["parameters"] / 2
        assert 0.99 * share < found[anchor]["anchor"] <= share + 4 * found[anchor]["num_layers"]
        assert found[anchor]["peak while attaching"] < share + 64 * 2**20
        assert any(rate > 0 for rate in found[anchor]["activation_rates"])
    assert found["file"]["losses"] == found["snapshot"]["losses"]
