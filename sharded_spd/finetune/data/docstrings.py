"""Functions of the standard library and what their docstrings say, read from its source files."""

from __future__ import annotations

import ast
import copy
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sharded_spd.errors import ConfigError

_LEFT_OUT = {"test", "tests", "site-packages", "__pycache__"}
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z`'\"(])")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


@dataclass(frozen=True)
class Function:
    """A function or method of a package; its docstring stands in one line.

    `code`: as `ast.unparse` writes it, without any docstring.
    """

    package: str
    name: str
    docstring: str
    first_sentence: str
    code: str

    @property
    def words(self) -> str:
        """The name as words: `_parse_header` and `parseHeader` are `parse header`."""
        return " ".join(_WORD.findall(self.name)).lower()


def read_functions(packages: Sequence[str], *, min_words: int, root: Path | None = None) -> list[Function]:
    """The documented functions of `packages`, modules or packages of the standard library, in files' order.

    No two have the same docstring, first sentence or code, so that none can stand in two splits; what two
    packages have alike is left out, since nothing tells which it is of. Nothing is imported.

    Raises:
        ConfigError: a package has no source files here.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    every = [function for name in packages for function in _of_package(root, name)]
    every = [f for f in every if len(f.docstring.split()) >= min_words and f.words]
    owners: dict[str, set[str]] = {}
    for function in every:
        for key in _keys(function):
            owners.setdefault(key, set()).add(function.package)
    seen: set[str] = set()
    found = []
    for function in every:
        keys = _keys(function)
        if not seen.intersection(keys) and all(len(owners[key]) == 1 for key in keys):
            found.append(function)
        seen.update(keys)
    return found


def shuffled(functions: Iterable[Function], *, seed: int) -> list[Function]:
    """In an order by hash: one function more, in another Python, moves the others by one place at most."""

    def key(function: Function) -> str:
        text = f"{seed}/{function.package}/{function.name}/{function.docstring}"
        return hashlib.sha256(text.encode()).hexdigest()

    return sorted(functions, key=key)


def _keys(function: Function) -> set[str]:
    def plain(text: str) -> str:
        return " ".join(re.findall(r"\w+", text.lower()))

    body = function.code.partition("\n")[2]
    keys = {f"text {plain(function.docstring)}", f"text {plain(function.first_sentence)}"}
    return keys | ({f"code {plain(body)}"} if len(body.split()) > 5 else set())


def _of_package(root: Path, name: str) -> Iterator[Function]:
    folder = root / name
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [root / f"{name}.py"]
    files = [f for f in files if f.is_file() and not _LEFT_OUT.intersection(f.relative_to(root).parts)]
    if not name.isidentifier() or not files:
        raise ConfigError(
            f"data.packages: {name} has no source files in {root}; name packages of the standard library "
            "whose sources this Python has"
        )
    for file in files:
        try:
            tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError) as error:
            raise ConfigError(f"data.packages: {file} cannot be read as Python: {error}") from None
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _documented(name, node)


def _documented(package: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[Function]:
    docstring = " ".join((ast.get_docstring(node) or "").split())
    if docstring:
        paragraph = (ast.get_docstring(node) or "").strip().split("\n\n", maxsplit=1)[0]
        first = _SENTENCE.split(" ".join(paragraph.split()), maxsplit=1)[0]
        code = ast.unparse(_WithoutDocstrings().visit(copy.deepcopy(node)))
        yield Function(package, node.name, docstring, first, code)


class _WithoutDocstrings(ast.NodeTransformer):
    def visit(self, node: ast.AST) -> ast.AST:
        """The node, without the string that its body begins with."""
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            documented = ast.get_docstring(node) is not None
            node.body = (node.body[1:] if documented else node.body) or [ast.Pass()]
        return self.generic_visit(node)
