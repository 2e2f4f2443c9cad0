"""A cache of compiled kernels, a compiler for it, and processes that use it."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sharded_spd.kernels import compile as compiling


@dataclass
class Place:
    """A cache, and a compiler that puts there what was compiled before, and counts."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "cache" / "sharded_spd" / "kernels"

    @property
    def temporary(self) -> Path:
        return self.root / "tmp" / f"sharded_spd-{os.geteuid()}"

    @property
    def library(self) -> Path:
        (found,) = self.folder.glob("cpu-*.so")
        return found

    def compiler(self, *lines: str) -> None:
        """Its script; `$out` is where the library goes."""
        script = self.root / "cc"
        script.write_text(
            "\n".join(
                [
                    "#!/bin/sh",
                    'if [ "$2" = "" ]; then echo "a compiler"; exit; fi',
                    'for out in "$@"; do :; done',
                    f"echo run >> {self.root}/runs",
                    *lines,
                ]
            )
        )
        script.chmod(0o755)

    def runs(self) -> int:
        """How often it was to compile."""
        runs = self.root / "runs"
        return len(runs.read_text().splitlines()) if runs.exists() else 0


@pytest.fixture(name="compiled", scope="module")
def fixture_compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = compiling._Build(compiling._compiler())
    path = tmp_path_factory.mktemp("compiled") / "cpu.so"
    path.write_bytes(compiling._compile(build._command))
    path.chmod(0o644)
    return path


@pytest.fixture(name="place")
def fixture_place(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    # Not pytest's own folder: another user has to get there.
    with tempfile.TemporaryDirectory(prefix="kernels-") as name:
        place = Place(Path(name))
        place.root.chmod(0o755)
        (place.root / "tmp").mkdir()
        (place.root / "tmp").chmod(0o1777)
        shutil.copy(compiled, place.root / "compiled.so")
        place.compiler(f'cp {place.root}/compiled.so "$out"')
        monkeypatch.setenv("CC", str(place.root / "cc"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(place.root / "cache"))
        monkeypatch.setattr(tempfile, "tempdir", str(place.root / "tmp"))
        monkeypatch.delenv("SHARDED_SPD_KERNELS", raising=False)
        yield place


def load() -> ctypes.CDLL | None:
    """As a process does at its first step."""
    return compiling.load_library.__wrapped__()


def in_children(*functions: Callable[[], object]) -> list[object]:
    """What functions return in processes of their own, which run at the same time."""
    children = []
    for function in functions:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(writer, json.dumps(function()).encode())
            except BaseException as error:
                os.write(writer, json.dumps(f"{type(error).__name__}: {error}").encode())
            os._exit(0)
        os.close(writer)
        children.append((pid, reader))
    results = []
    for pid, reader in children:
        with open(reader, "rb") as file:
            results.append(json.loads(file.read()))
        os.waitpid(pid, 0)
    return results


def messages(caplog: pytest.LogCaptureFixture) -> str:
    assert all(record.levelno >= logging.WARNING for record in caplog.records)
    return caplog.text
