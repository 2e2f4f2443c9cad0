"""The compiled kernels: built once per machine and source, by the C compiler that is there."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from sharded_spd.kernels.switch import SWITCH, choice

_LOG = logging.getLogger(__name__)
_NAMES = ("cpu.c", "cpu_io.h", "cpu_fast.h", "cpu_adam.h", "cpu_pull.h")
_SOURCES = tuple(Path(__file__).with_name(name) for name in _NAMES)
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-fopenmp")
_SECONDS = 120


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
        return ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        text = getattr(error, "stderr", None) or str(error)
        if chosen == "cpu":
            raise RuntimeError(f"{SWITCH}=cpu: the kernels cannot be compiled: {text}") from error
        _LOG.info("plain torch is used, the compiled kernels cannot be had: %s", text)
        return None


def _built() -> Path:
    """The library for this source, compiler and processor, compiled unless it is there."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise FileNotFoundError("there is no C compiler (cc, gcc, clang, or $CC)")
    command = [*compiler.split(), *_FLAGS]
    version = subprocess.run(
        [*compiler.split(), "--version"], capture_output=True, timeout=_SECONDS, check=True
    )
    key = hashlib.sha256(
        b"".join(source.read_bytes() for source in _SOURCES)
        + repr(command).encode()
        + version.stdout
        + _processor()
    ).hexdigest()
    folder = _folder()
    path = folder / f"cpu-{key[:20]}.so"
    if path.is_file():
        return path
    # Ranks that start together wait for the first one to compile.
    with open(folder / f"{path.stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            beside = folder / f".{path.name}.{os.getpid()}"
            subprocess.run(
                [*command, str(_SOURCES[0]), "-o", str(beside)],
                capture_output=True, text=True, timeout=_SECONDS, check=True,
            )  # fmt: skip
            os.replace(beside, path)
    return path


def _folder() -> Path:
    """A folder of this user's alone; where the home cannot be written, one beside the temporary files."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (
        home / "sharded_spd" / "kernels",
        Path(tempfile.gettempdir()) / f"sharded_spd-{os.getuid()}",
    ):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
            return folder
    raise OSError("there is no folder to keep the compiled kernels in; set XDG_CACHE_HOME")


def _processor() -> bytes:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor().encode()
    return "".join(
        sorted({line for line in lines if line.startswith(("flags", "model", "Features"))})
    ).encode()
