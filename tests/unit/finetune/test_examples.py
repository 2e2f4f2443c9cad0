"""The example that makes a language model's data of the standard library."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from sharded_spd.finetune.config import load_job

EXAMPLES = Path(__file__).resolve().parents[3] / "docs" / "examples"
SOURCE = '''"""What it is."""

class One:
    """Of a kind."""

    def two(self):
        """Returns
        three."""
        return 3  # text: """no docstring"""
'''


@pytest.fixture(scope="module")
def stdlib() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stdlib_example", EXAMPLES / "stdlib.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_docstrings_and_code_are_told_apart(stdlib: ModuleType) -> None:
    docs, code = stdlib.split("package.one", SOURCE)
    assert docs == ("module package.one\n\nWhat it is.\n\nOne\n\nOf a kind.\n\ntwo\n\nReturns\nthree.\n")
    assert code.splitlines() == [
        "class One:",
        "    def two(self):",
        '        return 3  # text: """no docstring"""',
    ]


def test_no_module_stands_in_two_files(
    stdlib: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"word{n} " for n in range(60))
    modules = [(f"m{n}", f'"""{n} {text}"""\nvalue = "{n} {text}"\n') for n in range(40)]
    monkeypatch.setattr(stdlib, "modules", lambda: iter(modules))
    files = stdlib.write_data(tmp_path)
    assert sorted(path.name for path in files) == [
        "code-test.jsonl",
        "code-train.jsonl",
        "docs-test.jsonl",
        "docs-train.jsonl",
    ]
    rows = {path.stem: [json.loads(line)["text"] for line in path.read_text().splitlines()] for path in files}
    for kind in ("docs", "code"):
        train, test = rows[f"{kind}-train"], rows[f"{kind}-test"]
        assert test
        assert len({*train, *test}) == len(train) + len(test) == 40


def test_its_job_loads() -> None:
    job = load_job(EXAMPLES / "stdlib.yaml")
    assert job.task == "causal-lm"
    assert job.compare == ("adamw", "spd")
