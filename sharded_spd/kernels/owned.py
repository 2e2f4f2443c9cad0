"""Files that no other user can have written or linked: code loaded from them runs as this user."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_WRITABLE = stat.S_IWGRP | stat.S_IWOTH


def own_folder(path: Path) -> Path:
    """The folder by its real path, created if missing.

    Raises:
        OSError: where it cannot be made, or someone but root and this user may change what lies in it.
    """
    for folder in (*reversed(path.parents), path):
        if not folder.exists():
            # Not makedirs: a wide umask would let a group write to the folders between.
            try:
                folder.mkdir(mode=0o700)
            except FileExistsError:  # made by a rank that started at the same time, or a dangling link
                continue
    real = Path(os.path.realpath(path.parent)) / path.name
    # In a user namespace (rootless containers), / and /tmp belong to a placeholder for the outer root.
    above = (*_trusted(), os.stat("/").st_uid)
    for parent in real.parents:
        state = os.stat(parent)
        if state.st_mode & _WRITABLE and state.st_mode & stat.S_ISVTX and state.st_uid in above:
            continue  # sticky, like /tmp: all may write, but none may rename others' files
        _judge(parent, state, above)
    state = os.lstat(real)
    if not stat.S_ISDIR(state.st_mode):
        raise OSError(f"{real} is no folder (a link, or a file)")
    _judge(real, state)
    return real


def open_owned(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a plain file; what is checked is what was opened, whatever the path means later.

    Raises:
        OSError: where it cannot be opened, is a link or no plain file, or others may have written it.
    """
    # Opening must not block on a pipe in its place.
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise OSError(f"{path} is no plain file")
        _judge(path, state)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """Hold the lock `path`, alone on this machine.

    Raises:
        OSError: as `open_owned`; TimeoutError, which is one, where another holds it for `seconds`.
    """
    descriptor = open_owned(path, os.O_RDWR | os.O_CREAT)
    try:
        until = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TimeoutError(f"{path} was held by another process for {seconds:.0f} s") from None
            time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def _trusted() -> tuple[int, ...]:
    return os.geteuid(), 0


def _judge(path: Path, state: os.stat_result, owners: tuple[int, ...] = ()) -> None:
    if state.st_uid not in (owners or _trusted()):
        raise OSError(f"{path} belongs to user {state.st_uid}, not to this one ({os.geteuid()}) or root")
    if state.st_mode & _WRITABLE:
        raise OSError(f"{path} can be written by others (mode {stat.S_IMODE(state.st_mode):04o})")
