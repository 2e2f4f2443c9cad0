"""docs/architecture.md and its picture say what the code does."""

from __future__ import annotations

import importlib
import pkgutil
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

import sharded_spd

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(sharded_spd.__file__).parent
PAGES = sorted(
    {*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")} - {ROOT / "CHANGELOG.md"}
)
"""The changelog speaks of what is no more, too."""

ARCHITECTURE = ROOT / "docs" / "architecture.md"
LIMITS = {"add a rule": 3, "add an engine": 4, "follow one step": 12, "change the checkpoint format": 2}
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
NAMED = re.compile(r"`((?:sharded_spd|tests|docs|benchmarks|configs|launch)/(?!\S*NAME)[\w./-]*\w)`")
DOTTED = re.compile(r"\b(sharded_spd(?:\.\w+)+)")


def _script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "draw_architecture.py"))


def test_the_picture_is_that_of_the_code() -> None:
    script = _script()
    assert script["TARGET"].read_text(encoding="utf-8") == script["draw"](), (
        "docs/architecture.svg is another; draw it: python docs/draw_architecture.py, and look at it"
    )


def test_the_picture_is_only_of_this_checkout() -> None:
    assert PACKAGE == ROOT / "sharded_spd", f"the picture was compared with {PACKAGE}"


@pytest.mark.filterwarnings("error:sharded_spd")  # a module's old name
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_modules_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    files = [
        *(page.parent / name for name in LINK.findall(text)),
        *(ROOT / name for name in NAMED.findall(text)),
    ]
    assert not [str(file) for file in files if not file.exists()]
    for module in DOTTED.findall(text):
        pkgutil.resolve_name(module)
    for module, names in re.findall(r"from (sharded_spd[\w.]*) import ([\w, ]+)", text):
        for name in names.split(","):
            assert hasattr(importlib.import_module(module), name.strip()), f"no {name} in {module}"


def test_the_lists_of_what_to_read_are_short() -> None:
    sections = ARCHITECTURE.read_text(encoding="utf-8").split("### To ")[1:]
    files = {title: LINK.findall(body) for title, _, body in (part.partition("\n") for part in sections)}
    assert files.keys() == LIMITS.keys()
    for title, names in files.items():
        assert 0 < len(names) == len(set(names)) <= LIMITS[title], title


def test_the_ten_words_are_where_the_page_says() -> None:
    rows = re.findall(r"^\| \w+ \|.*\| `(\w+)`, \[.*\]\((.*)\) \|$", ARCHITECTURE.read_text(), re.M)
    assert len(rows) == 10
    for name, path in rows:
        file = (ARCHITECTURE.parent / path).resolve()
        source = file.read_text(encoding="utf-8")
        assert re.search(rf"^(class|def) {name}\b", source, re.M), f"no {name} in {path}"


def test_the_page_has_a_word_for_every_folder() -> None:
    table = ARCHITECTURE.read_text(encoding="utf-8").partition("## Folders")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert named == [name for layer in _script()["read_layers"]() for name in layer]
