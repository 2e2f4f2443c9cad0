"""The benchmark of robustness: how it chooses, what it writes, and that it goes on where it stopped."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.robustness import language
from benchmarks.robustness.choose import Tuned, choose
from benchmarks.robustness.fronts import above, beats, write_fronts
from benchmarks.robustness.methods import METHODS, VARIANTS, WISE
from benchmarks.robustness.runs import Book
from benchmarks.robustness.search import defaults
from benchmarks.robustness.settings import SETTINGS, smoke
from benchmarks.robustness.summary import summarise
from benchmarks.robustness.training import Task, _settled, scratch, settings_of, weights_of
from sharded_spd.finetune.config import load_job

ROOT = Path(__file__).resolve().parents[2]


def test_choose() -> None:
    """The strongest candidate that the validation set cannot tell from the best one."""
    accuracy = Tuned(higher_is_better=True, examples=400, slack=None)  # at 95 %: one error is 1.09
    assert choose({0: [95, 95], 1: [94, 94], 2: [93, 93]}, accuracy) == 1
    assert choose({0: [90, 90], 1: [95, 95], 2: [90, 90]}, accuracy) == 1
    assert choose({0: [10], 1: [math.nan]}, accuracy) == 0
    perplexity = Tuned(higher_is_better=False, examples=10, slack=0.01)
    assert choose({0: [5.0], 1: [4.96], 2: [5.02]}, perplexity) == 1
    assert choose({0: [5.0], 1: [4.96], 2: [5.005]}, perplexity) == 2


@pytest.mark.parametrize("name", SETTINGS)
def test_every_candidate_is_a_job(name: str) -> None:
    """Settings that a job does not know would be found hours later."""
    setting = SETTINGS[name]
    for method in (*METHODS, *VARIANTS):
        assert len(method.candidates) == 4
        for candidate in method.candidates:
            rule = [] if method.rule == "adamw" else [f"spd.rule={method.rule}"]
            own = [f"compare=[{method.rule}]", *method.settings, *rule, *_settled(setting, candidate, of=2)]
            job = load_job(setting.recipe, [*setting.overrides, *own])
            assert job.compare == (method.rule,)
            assert job.seeds == (0,)
    usual = load_job(setting.recipe, setting.overrides).train.lr
    assert load_job(setting.recipe, [*setting.overrides, *_settled(setting, (), of=2)]).train.lr == usual / 8
    own = _settled(setting, METHODS[0].candidates[0], of=2)
    assert load_job(setting.recipe, [*setting.overrides, *own]).train.lr == 2 * usual


def test_documentation_and_code() -> None:
    source = (
        '"""Of the module."""\nimport os\n\n\ndef f(x):\n    """Of f:\n\n    more."""\n    return "x", x\n'
    )
    docs, code = language.split(source)
    assert docs == "Of the module.\n\nOf f:\n\nmore."
    assert code == 'import os\ndef f(x):\n    return "x", x'


def test_no_module_is_in_two_parts(tmp_path: Path) -> None:
    language.write_data(tmp_path)
    for kind in ("docs", "code"):
        texts = [
            {
                json.loads(line)["text"]
                for line in (tmp_path / f"{kind}-{part}.jsonl").read_text().splitlines()
            }
            for part in language.PARTS
        ]
        assert all(texts)
        assert texts[0].isdisjoint(texts[1] | texts[2])
        assert texts[1].isdisjoint(texts[2])
        sizes = [sum(map(len, part)) for part in texts]
        assert all(size <= most for size, most in zip(sizes, language.PARTS.values(), strict=True))


def test_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Means, the worst set of each seed, and standard errors, by hand."""

    def line(method: str, seed: int, test: float, a: float, b: float) -> dict:
        scores = {"test": test, "a": a, "b": b}
        shared = {"metric": "accuracy", "higher_is_better": True, "zero_shot": {"test": 50, "a": 40, "b": 20}}
        layers = {"x": (0.3, 1.0), "y": (0.4, 0.0)}
        key = f"digits {method} 1 {seed} final"
        return {
            **shared, "key": key, "scores": scores, "deviation": 0.1 * (seed + 1), "activation_rate": 0.5,
            "layers": layers,
        }  # fmt: skip

    lines = [line("SPD", 0, 90, 80, 70), line("SPD", 1, 94, 70, 80), line("AdamW", 0, 95, 60, 61)]
    summarise({"digits": [*lines, {"key": "digits SPD 1 100 tune", "validation": 3}]}, tmp_path)
    found = json.loads((tmp_path / "summary.json").read_text())["digits"]
    assert [row["method"] for row in found] == ["pre-trained", "AdamW", "SPD"]
    spd = found[2]
    assert spd["id"] == [92, pytest.approx(2)]
    assert spd["ood"] == [75, pytest.approx(0)]
    assert spd["worst"] == [70, pytest.approx(0)]
    assert spd["deviation"] == [pytest.approx(15), pytest.approx(5)]
    assert spd["chosen"] == "λ 8"
    assert found[1]["rate"] == [None, None]
    assert found[0]["worst"][0] == 20
    assert "| SPD | λ 8 | 92.0 ± 2.0 | 75.0 ± 0.0 |" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {
        "summary.json",
        "table.md",
        "id_ood.png",
        "layers-digits.png",
    }


def test_other_settings_are_another_training(tmp_path: Path) -> None:
    """A line counts only as what would be done now; of a line that was cut short nothing is left."""
    setting, path = SETTINGS["digits"], tmp_path / "digits.jsonl"
    task = Task("digits", "SPD", 1, 0, False, of=2)
    Book(path, setting).add(task, {"validation": 90})
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"key": "digits SPD 2 0 final", "val')
    book = Book(path, setting)
    line = book.get(task)
    assert line is not None
    assert line["validation"] == 90
    assert "spd.weight_decay=8" in line["settings"]
    assert "train.lr=0.000125" in line["settings"]
    assert len(path.read_text().splitlines()) == 1
    other = replace(task, of=1)
    assert book.get(other) is None
    assert Book(path, smoke(setting)).get(task) is None
    assert scratch(other, setting) != scratch(task, setting)
    book.add(other, {"validation": 91, "layers": {"x": (1, 2)}})
    again = Book(path, setting)
    assert again.validation([other]) == [91]
    assert again.get(task) is None
    assert len(again.lines) == 1
    assert "layers" in again.lines[0]
    small = Book(tmp_path / "small.jsonl", setting, layers=False)
    small.add(other, {"validation": 91, "layers": {"x": (1, 2)}})
    assert "layers" not in small.lines[0]


def test_adamw_has_learning_rates_of_its_own() -> None:
    """Whoever asks for its weights means the same training, and the same folder."""
    setting = SETTINGS["digits"]
    own = Task("digits", "AdamW", 1, 0, False)
    wise = Task("digits", WISE, 3, 0, False, of=1)
    assert scratch(weights_of(wise), setting) == scratch(own, setting)
    assert settings_of(wise, setting)[-1] == "alpha=0.2"


def test_the_newest_choice_is_the_table_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trainings of a candidate that is not chosen any more stay in the file, not in the mean."""
    line = {"metric": "accuracy", "higher_is_better": True, "deviation": 0.1, "activation_rate": 0.5}
    old = {**line, "key": "digits SPD 2 0 final", "scores": {"test": 50, "a": 50}, "layers": {"x": (1, 2)}}
    new = {**old, "key": "digits SPD 3 0 final", "scores": {"test": 90, "a": 80}}
    summarise({"digits": [old, new]}, tmp_path)
    text = capsys.readouterr().out
    assert "| SPD | λ 512 | 90.0 | 80.0 |" in text
    assert "Took the last of their four: SPD." in text


def test_smoke_leaves_the_results_alone() -> None:
    for module in ("benchmarks.robustness", "benchmarks.robustness.search"):
        done = subprocess.run(
            [sys.executable, "-m", module, "--smoke"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert "name another --out" in done.stderr


def test_beaten() -> None:
    """On both sides not worse, on one by two standard errors of the paired difference."""
    plain = [(90.0, 60.0), (92.0, 64.0), (94.0, 62.0)]
    better = [(x + 1 + noise, y) for (x, y), noise in zip(plain, (0.1, -0.1, 0), strict=True)]
    assert beats(better, plain)
    assert not beats(plain, better)
    assert not beats(plain, plain)
    assert beats([(x - 1e-13, y + 1) for x, y in plain], plain)
    assert not beats([(x + 1, y - 0.1) for x, y in plain], plain)
    assert not beats([(90.0, 70.0), (92.0, 58.0), (94.0, 61.0)], plain)  # +1 on average, +-4.7


def test_above_the_curve() -> None:
    """Between the points that no other one beats; the first and last hold beyond them."""
    curve = [(90.0, 80.0), (92.0, 70.0), (91.0, 60.0), (94.0, 50.0)]  # (91, 60) is beaten by (92, 70)
    assert above((92.0, 77.0), curve) == pytest.approx(0.1)
    assert above((91.0, 75.0), curve) == pytest.approx(0.0)
    assert above((80.0, 88.0), curve) == pytest.approx(0.1)
    assert above((95.0, 55.0), curve) == pytest.approx(0.1)
    assert above((-3.0, -9.0), [(-2.0, -12.0), (-4.0, -8.0)]) == pytest.approx(0.1)


def test_who_is_beaten_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rule that nothing beats anywhere is named; less perplexity is more."""

    def lines(setting: str, method: str, candidate: int, test: float, other: float, up: bool) -> list[dict]:
        return [
            {
                "key": f"{setting} {method} {candidate} {seed} final",
                "higher_is_better": up,
                "scores": {"test": test + seed / 10, "a": other + seed / 10, "b": other + seed / 10},
            }
            for seed in (0, 1)
        ]

    digits = [*lines("digits", "AdamW", 1, 90, 60, True), *lines("digits", "SPD", 1, 90, 70, True)]
    code = [*lines("code", "AdamW", 1, 7, 9, False), *lines("code", "SPD", 1, 7.5, 8, False)]
    code += lines("code", "drag", 2, 7, 8.5, False)
    write_fronts({"digits": digits, "code": code}, (0, 1), tmp_path)
    text = (tmp_path / "search.md").read_text()
    assert "| AdamW (lr x 0.5) | 0 | 0 | SPD (λ 8) |" in text
    assert "| SPD (λ 8) | -0.5 ± 0 | +1 ± 0 | - |" in text
    assert "| drag (λ 0.3) | +0 ± 0 | +0.5 ± 0 | - |" in text
    assert "Beaten in no setting, at one strength: SPD (λ 8)." in text
    assert text.strip() in capsys.readouterr().out


def test_one_strength_for_all_settings() -> None:
    """The strongest that validation cannot tell from the best, in every setting; none, if they disagree."""

    class Given:
        def __init__(self, **good: set[int]) -> None:
            self.good = good.__getitem__

    searches = [Given(a={-1, 0, 1, 2}, b={-1, 2}), Given(a={0, 1}, b={-1, 0})]
    assert defaults(searches, ["a", "b"]) == {"a": 1}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smoke(tmp_path: Path) -> None:
    """All of it at its smallest; killed in the middle, it does nothing twice."""
    command = [sys.executable, "-m", "benchmarks.robustness", "--smoke", "--jobs", "2"]
    where = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    first = subprocess.Popen(
        [*command, *where],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert first.stdout is not None
    while "final" not in first.stdout.readline():
        assert first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = (tmp_path / "out" / "digits.jsonl").read_text().splitlines()
    subprocess.run([*command, *where], cwd=ROOT, env=environment, check=True, timeout=1200)
    methods = {*(m.name for m in METHODS), WISE}
    for name, setting in SETTINGS.items():
        lines = (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        keys = [line["key"] for line in found]
        assert len(keys) == len(set(keys))
        finals = {key.split()[1] for key in keys if key.endswith("final")}
        assert finals == (methods if setting.probe else methods - {"LP-FT"})
        assert lines[: len(before)] == before or name != "digits"
        assert (tmp_path / "out" / f"layers-{name}.png").stat().st_size > 10_000
    search = [sys.executable, "-m", "benchmarks.robustness.search", "--smoke", "--jobs", "2", *where]
    subprocess.run(search, cwd=ROOT, env=environment, check=True, timeout=400)
    text = (tmp_path / "out" / "search" / "search.md").read_text()
    assert all(setting.title in text for setting in SETTINGS.values())
    kept = tmp_path / "work" / "smoke-digits"
    assert {path.name.split("-")[1] for path in kept.iterdir()} == {"AdamW"}
    assert load_file(next(kept.glob("*-final-*")) / "checkpoint" / "model.safetensors")
