"""Where compiled kernels are kept: what is loaded, what is built anew, and what stands in for them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sharded_spd.kernels import compile as compiling
from sharded_spd.kernels import cpu, kernels_for
from sharded_spd.kernels.library import sealed
from tests.support.kernel_cache import (
    Place,
    fixture_compiled,
    fixture_place,
    in_children,
    load,
    messages,
)

__all__ = ["fixture_compiled", "fixture_place"]

STRANGER = 54321
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away, or become another")


def test_what_is_kept_is_loaded_again(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is compiled twice, nothing said, and nobody else may write or read it."""
    assert load() is not None
    assert load() is not None
    assert place.runs() == 1
    assert stat.S_IMODE(place.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(place.library.stat().st_mode) == 0o600
    assert not caplog.records
    assert sorted(path.suffix for path in place.folder.iterdir()) == [".lock", ".so"]


def test_a_wide_umask_opens_nothing(place: Place) -> None:
    """A group that may write to a folder in between could put another in its place."""
    before = os.umask(0)
    try:
        assert load() is not None
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (place.folder, place.folder.parent)] == [0o700] * 2
    assert place.library.is_file()


def _cut(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _change_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _put_another(path: Path) -> None:
    """A sound library, sealed as ours are, with other functions."""
    import _ctypes

    key = path.stem.removeprefix("cpu-")
    path.write_bytes(sealed(Path(_ctypes.__file__).read_bytes(), key))


def _of_other_source(path: Path) -> None:
    key = path.stem.removeprefix("cpu-")
    content = (path.parents[3] / "compiled.so").read_bytes()
    path.write_bytes(sealed(content.replace(compiling._source().encode(), b"x" * 20), key))


def _of_other_machine(path: Path) -> None:
    content = bytearray((path.parents[3] / "compiled.so").read_bytes())
    content[18:20] = b"\xf3\x00" if content[18] != 0xF3 else b"\x3e\x00"  # e_machine: RISC-V, or x86-64
    path.write_bytes(sealed(bytes(content), path.stem.removeprefix("cpu-")))


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere.so"))
    path.symlink_to("elsewhere.so")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda path: path.write_bytes(b""), "is empty"),
        (_cut, "is damaged"),
        (_change_a_bit, "is damaged"),
        (lambda path: path.write_text("#!/bin/sh\n"), "is damaged"),
        (_put_another, "other functions"),
        (_of_other_source, "another source"),
        (_of_other_machine, "cannot be loaded"),
        (_link, "cpu-"),
        (_pipe, "no plain file"),
        (lambda path: path.chmod(0o620), "can be written by others"),
        pytest.param(lambda path: os.chown(path, STRANGER, 0), "belongs to user 54321", marks=as_root),
    ],
)
def test_what_is_no_library_of_ours_is_built_anew(
    harm: Callable[[Path], object], reason: str, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, with a warning; what was there is not run."""
    assert load() is not None
    # What this process has loaded stays as it is: the harm is done to a copy.
    copy = shutil.copy2(place.library, place.root / "copy")
    os.replace(copy, place.library)
    harm(place.library)
    assert load() is not None
    assert place.runs() == 2
    assert reason in messages(caplog)
    assert "built anew" in caplog.text
    caplog.clear()
    assert load() is not None
    assert place.runs() == 2
    assert not caplog.records


def _folder_is_a_link(place: Place) -> None:
    place.folder.rename(place.root / "elsewhere")
    place.folder.symlink_to(place.root / "elsewhere")


def _lock_is_a_link(place: Place) -> None:
    lock = place.library.with_suffix(".lock")
    place.library.unlink()
    lock.unlink()
    lock.symlink_to(place.root / "made")


def _lock_is_a_strangers(place: Place) -> None:
    os.chown(place.library.with_suffix(".lock"), STRANGER, 0)
    place.library.unlink()


def _library_is_a_folder(place: Place) -> None:
    path = place.library
    path.unlink()
    path.mkdir()


def _not_to_be_made(place: Place) -> None:
    shutil.rmtree(place.root / "cache")
    (place.root / "cache").write_text("a file")


@pytest.mark.parametrize(
    "harm",
    [
        _folder_is_a_link,
        lambda place: place.folder.chmod(0o770),
        lambda place: place.folder.chmod(0o1777),
        lambda place: place.folder.parent.chmod(0o777),
        pytest.param(lambda place: os.chown(place.folder, STRANGER, 0), marks=as_root),
        pytest.param(lambda place: os.chown(place.root / "cache", STRANGER, 0), marks=as_root),
        _lock_is_a_link,
        pytest.param(_lock_is_a_strangers, marks=as_root),
        _library_is_a_folder,
        _not_to_be_made,
    ],
)
def test_a_folder_that_others_can_change_is_left_alone(harm: Callable[[Place], object], place: Place) -> None:
    """The temporary folder serves instead; what lies in the first one is not run."""
    assert load() is not None
    harm(place)
    assert load() is not None
    assert len(list(place.temporary.glob("cpu-*.so"))) == 1
    assert not (place.root / "made").exists()


@as_root
def test_a_temporary_folder_of_a_stranger(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """Made before this user came: plain torch, and the warning names it."""
    (place.root / "cache").write_text("a file")
    place.temporary.mkdir()
    os.chown(place.temporary, STRANGER, 0)
    assert load() is None
    assert f"{place.temporary} belongs to user {STRANGER}" in messages(caplog)
    assert "plain torch is used" in caplog.text


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (['echo garbage > "$out"'], "is no library|invalid ELF header|file too short"),
        ([': > "$out"'], "file too short|is no library"),
        ([], "wrote no library"),
        (["printf 'no \\377 header' >&2", "exit 3"], "exit status 3.* header"),
        (["kill -9 $$"], "SIGKILL"),
    ],
)
def test_a_compiler_that_fails(
    lines: list[str],
    reason: str,
    place: Place,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One warning with the reason, nothing left behind; the next process tries again."""
    good = (place.root / "cc").read_text()
    place.compiler(*lines)
    assert load() is None
    assert re.search(reason, messages(caplog))
    assert len(caplog.records) == 1
    assert not list(place.folder.glob("*.so")) + list(place.folder.glob(".cpu*"))
    monkeypatch.setenv("SHARDED_SPD_KERNELS", "cpu")
    with pytest.raises(RuntimeError, match="SHARDED_SPD_KERNELS=cpu: the kernels cannot be compiled"):
        load()
    (place.root / "cc").write_text(good)
    assert load() is not None


@pytest.mark.parametrize("wrong", ["/nonexistent/cc", "/", "cc 'unclosed", "/etc/passwd"])
def test_a_wrong_compiler_is_named(
    wrong: str, place: Place, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", wrong)
    assert load() is None
    assert "plain torch is used" in messages(caplog)


def test_ranks_wait_for_a_slow_compiler_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """They give up together; so do those that start soon after, and later ones try again."""
    place.compiler("sleep 600 &", f"echo $! >> {place.root}/pids", "wait")
    monkeypatch.setattr(compiling, "_SECONDS", 1)

    def rank() -> float | None:
        began = time.monotonic()
        return None if load() is not None else time.monotonic() - began

    seconds = in_children(rank, rank)
    assert None not in seconds
    assert place.runs() == 1
    assert load() is None
    assert place.runs() == 1
    for pid in (place.root / "pids").read_text().split():
        with pytest.raises(ProcessLookupError):
            _wait_until_gone(int(pid))
    (record,) = place.folder.glob("*.failed")
    told = json.loads(record.read_text())
    record.write_text(json.dumps({**told, "time": told["time"] - 3600}))
    place.compiler(f'cp {place.root}/compiled.so "$out"')
    assert load() is not None
    assert not record.exists()


def _wait_until_gone(pid: int) -> None:
    for _ in range(100):
        os.kill(pid, 0)
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            raise ProcessLookupError
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)


def test_a_rank_that_holds_the_lock_for_ever(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that was stopped: the others go on without."""
    assert load() is not None
    lock = place.library.with_suffix(".lock")
    place.library.unlink()
    monkeypatch.setattr(compiling, "_SECONDS", -compiling._VERSION_SECONDS + 0.2)
    with compiling.locked(lock, 1):
        assert load() is None
    assert "was held by another process" in messages(caplog)
    assert place.runs() == 1
    assert not place.temporary.exists()


@as_root
def test_a_user_without_home_or_name(place: Place) -> None:
    """As in containers that run under any number: the temporary folder serves, or plain torch."""

    def become(tempdir: Path) -> object:
        os.setgroups([])
        os.setgid(STRANGER)
        os.setuid(STRANGER)
        os.environ.pop("HOME", None)
        os.environ.pop("XDG_CACHE_HOME")
        tempfile.tempdir = str(tempdir)
        with pytest.raises(RuntimeError):
            Path.home()
        return load() is not None

    there, not_there = in_children(
        lambda: become(place.root / "tmp"), lambda: become(place.root / "nonexistent")
    )
    assert (there, not_there) == (True, False)
    assert len(list((place.root / "tmp" / f"sharded_spd-{STRANGER}").glob("cpu-*.so"))) == 1


@as_root
def test_a_cache_that_only_root_may_write(place: Place) -> None:
    """As in an image: what is there is used, by every user."""
    assert load() is not None
    for path in (place.folder, place.folder.parent, place.folder.parent.parent):
        path.chmod(0o755)
    place.library.chmod(0o644)

    def become() -> bool:
        os.setuid(STRANGER)
        return load() is not None

    assert in_children(become) == [True]
    assert place.runs() == 1


@as_root
def test_a_full_disk(place: Place) -> None:
    """A real one, mounted; the library goes to the temporary folder, and no part of it stays."""
    cache = place.root / "cache"
    cache.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k,mode=700", "tmpfs", str(cache)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a mount needs more rights than these")
    try:
        assert load() is not None
        assert not list(place.folder.glob("*.so")) + list(place.folder.glob(".cpu*"))
    finally:
        subprocess.run(["umount", str(cache)], check=True)
    assert len(list(place.temporary.glob("cpu-*.so"))) == 1


def _package(place: Place, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the source, as another package has it."""
    package = place.root / "package"
    package.mkdir()
    for name in compiling._NAMES:
        shutil.copy(Path(compiling.__file__).with_name(name), package)
    monkeypatch.setattr(compiling, "_PACKAGE", package)
    return package


def test_a_library_that_the_package_brings(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It serves where nothing can be compiled, if it is of this very source."""
    package = _package(place, monkeypatch)
    monkeypatch.setenv("CC", "/nonexistent/cc")
    content, source = (place.root / "compiled.so").read_bytes(), compiling._source()
    (package / "_cpu.so").write_bytes(sealed(content, source))
    assert load() is not None
    with open(package / "cpu.c", "a", encoding="utf-8") as file:
        file.write("/* newer */")
    assert load() is None
    assert "_cpu.so is damaged, or of another source" in messages(caplog)


def test_kernels_that_compute_something_else(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They do a step beside plain torch before they are used, whoever compiled them."""
    package = _package(place, monkeypatch)
    right = (package / "cpu.c").read_text()
    (package / "cpu.c").write_text(
        right.replace("if (pull[i] == 0) continue;", "if (pull[i] != 0) continue;")
    )
    monkeypatch.delenv("CC")
    monkeypatch.setattr(cpu, "load_library", compiling.load_library.__wrapped__)
    assert kernels_for.__wrapped__("cpu").name == "reference"
    assert "other pulled weights than plain torch" in messages(caplog)
    monkeypatch.setenv("SHARDED_SPD_KERNELS", "cpu")
    with pytest.raises(RuntimeError, match="SHARDED_SPD_KERNELS=cpu: the compiled kernels are wrong"):
        kernels_for.__wrapped__("cpu")
