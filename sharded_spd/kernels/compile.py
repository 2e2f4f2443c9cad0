"""The compiled kernels: built once per machine and source, by the C compiler that is there."""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from sharded_spd.kernels.library import load_sealed, sealed
from sharded_spd.kernels.owned import locked, open_owned, own_folder
from sharded_spd.kernels.switch import SWITCH, choice

_LOG = logging.getLogger(__name__)
_NAMES = ("cpu.c", "cpu_io.h", "cpu_fast.h", "cpu_adam.h", "cpu_pull.h")
_PACKAGE = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-fopenmp")
_SECONDS = 120
_VERSION_SECONDS = 30
_REMEMBERED = 300
"""Seconds for which a compiler that did not end in time is not tried again."""


@cache
def load_library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there is no compiler, or they are switched off. Built on first use.

    Raises:
        RuntimeError: where they are asked for and cannot be had.
    """
    chosen = choice()
    if chosen == "reference":
        return None
    try:
        return _built()
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        failed, text = error, _told(error)
    try:
        bundled = _bundled()
    except OSError as error:
        text = f"{text}; {error}"
    else:
        if bundled is not None:
            _LOG.info("the kernels that the package brings along are used: %s", text)
            return bundled
    if chosen == "cpu":
        raise RuntimeError(f"{SWITCH}=cpu: the kernels cannot be compiled: {text}") from failed
    _LOG.warning("plain torch is used, the compiled kernels cannot be had: %s", text)
    return None


def _built() -> ctypes.CDLL:
    """The library for this source, compiler and processor, compiled unless it is there."""
    build = _Build(_compiler())
    reasons = []
    for folder in _folders():
        try:
            return build.kept_in(own_folder(folder))
        except TimeoutError:  # no rank waits twice
            raise
        except OSError as error:  # read-only, full, another's, or one from which nothing may be run
            reasons.append(str(error))
    raise OSError(f"there is no folder to keep them in; set XDG_CACHE_HOME ({'; '.join(reasons)})")


class _Build:
    """What one compiler makes of the source on this machine."""

    def __init__(self, compiler: list[str]) -> None:
        self._began = time.time()
        self._source = _source()
        self._command = [*compiler, *_FLAGS, f'-DSPD_SOURCE="{self._source}"']
        version = _run([*compiler, "--version"], _VERSION_SECONDS)
        key = self._source.encode() + repr(self._command).encode() + version + _processor()
        self._key = hashlib.sha256(key).hexdigest()[:20]
        self._content: bytes | None = None

    def kept_in(self, folder: Path) -> ctypes.CDLL:
        """The library that is kept in a folder of this user's; where it is none, one is put there.

        Raises:
            OSError: where there is none and none can be kept.
            SubprocessError: where the compiler fails.
        """
        path = folder / f"cpu-{self._key}.so"
        with suppress(OSError):  # told below, where it is found again
            return self._load(path)
        # Ranks that start together wait for the first one to compile.
        with locked(path.with_suffix(".lock"), _SECONDS + _VERSION_SECONDS):
            try:
                return self._load(path)
            except FileNotFoundError:
                pass
            except OSError as error:
                _LOG.warning("compiled kernels are built anew: %s", error)
            failures = path.with_suffix(".failed")
            self._heed(failures)
            if self._content is None:
                try:
                    self._content = sealed(_compile(self._command), self._key)
                except subprocess.SubprocessError as error:
                    self._remember(failures, error)
                    raise
            library = self._put(path)
            failures.unlink(missing_ok=True)
            return library

    def _load(self, path: Path) -> ctypes.CDLL:
        return load_sealed(open_owned(path), path, self._key, self._source)

    def _put(self, path: Path) -> ctypes.CDLL:
        """Write the library, and load it before anyone else can find it."""
        assert self._content is not None
        for left in path.parent.glob(f".{path.name}.*"):  # by a process that was ended; the lock is held
            left.unlink()
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(open_owned(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
                file.write(self._content)
            library = self._load(beside)
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        return library

    def _remember(self, path: Path, error: subprocess.SubprocessError) -> None:
        late = isinstance(error, subprocess.TimeoutExpired)
        record = {"key": self._key, "time": time.time(), "late": late, "reason": _told(error)}
        # Without a record the next rank tries for itself, which takes time and does no harm.
        with suppress(OSError), open(open_owned(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as file:
            json.dump(record, file)

    def _heed(self, path: Path) -> None:
        """Fail as the rank did that had the lock before, rather than to wait as long once more."""
        try:
            with open(open_owned(path), encoding="utf-8") as file:
                record = json.load(file)
            key, then, late = str(record["key"]), float(record["time"]), bool(record["late"])
            reason = str(record["reason"])
        except (OSError, ValueError, TypeError, KeyError):
            return
        recent = 0 <= time.time() - then < _REMEMBERED
        if key == self._key and recent and (late or then >= self._began):
            raise subprocess.SubprocessError(f"{reason} (so {path} says, of {time.time() - then:.0f} s ago)")


def _compiler() -> list[str]:
    found = shlex.split(os.environ.get("CC", ""))
    if not found:
        found = [path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))][:1]
    if not found:
        raise FileNotFoundError("there is no C compiler (cc, gcc, clang, or $CC)")
    return found


def _compile(command: list[str]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="sharded_spd-") as folder:
        path = Path(folder) / "cpu.so"
        _run([*command, str(_PACKAGE / _NAMES[0]), "-o", str(path)], _SECONDS)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise subprocess.SubprocessError(f"{shlex.join(command)} wrote no library") from None


def _run(command: list[str], seconds: float) -> bytes:
    """What a command writes. One that takes too long is ended with all that it started."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=seconds)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, out, err)
    return out


def _told(error: Exception) -> str:
    """What went wrong, with what the compiler said last."""
    said = error.stderr if isinstance(error, subprocess.CalledProcessError) else None
    return f"{error} {said.decode(errors='replace').strip()[-2000:]}" if said else str(error)


def _folders() -> Iterator[Path]:
    """Where libraries may be kept: in this user's cache, else beside the temporary files."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(home):
        yield Path(home) / "sharded_spd" / "kernels"
    else:
        with suppress(RuntimeError):  # neither $HOME nor a user of this number
            yield Path.home() / ".cache" / "sharded_spd" / "kernels"
    yield Path(tempfile.gettempdir()) / f"sharded_spd-{os.geteuid()}"


def _bundled() -> ctypes.CDLL | None:
    """The library that a wheel may bring along (`_cpu*.so`, sealed with its source), for want of a compiler.

    Who can write it can write this module as well: its owner is not asked.
    """
    for path in sorted(_PACKAGE.glob("_cpu*.so")):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return load_sealed(descriptor, path, _source(), _source())
    return None


def _source() -> str:
    """A name for the source as it is."""
    return hashlib.sha256(b"".join((_PACKAGE / name).read_bytes() for name in _NAMES)).hexdigest()[:20]


def _processor() -> bytes:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor().encode()
    return "".join(
        sorted({line for line in lines if line.startswith(("flags", "model", "Features"))})
    ).encode()
