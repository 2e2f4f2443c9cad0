"""The compiled kernels as a file: a sealed shared library that says of which source it is."""

from __future__ import annotations

import ctypes
import hashlib
import os
from pathlib import Path

_SEAL = b"sharded_spd sealed "
_SEAL_SIZE = len(_SEAL) + hashlib.sha256().digest_size
_FUNCTIONS = ("spd_sums", "spd_adam", "spd_pull")


def sealed(content: bytes, key: str) -> bytes:
    """A shared library with its checksum at the end, where the loader does not look.

    Loading one that was cut off would end the process (SIGBUS), so that it must be known before.
    """
    return content + _SEAL + hashlib.sha256(key.encode() + content).digest()


def load_sealed(descriptor: int, path: Path, key: str, source: str) -> ctypes.CDLL:
    """The library in a file that is open, which takes the descriptor over.

    Args:
        descriptor: of the file, open for reading.
        path: what messages call it.
        key: what it was sealed with.
        source: what the kernels in it say that they were compiled from.

    Raises:
        OSError: where it is damaged, of another source, or not to be loaded on this machine.
    """
    loaded = False
    try:
        with open(descriptor, "rb", closefd=False) as file:
            whole = file.read()
        if not whole:
            raise OSError(f"{path} is empty")
        if whole != sealed(whole[:-_SEAL_SIZE], key):
            raise OSError(f"{path} is damaged, or of another source or machine: its checksum is wrong")
        opened = f"/proc/self/fd/{descriptor}"
        try:
            library = ctypes.CDLL(opened if os.path.exists(opened) else str(path))
        except OSError as error:
            raise OSError(f"{path} cannot be loaded: {error}") from error
        loaded = True
    finally:
        # The loader takes two libraries of one name for the same: the number of a loaded one stays taken.
        if not loaded:
            os.close(descriptor)
    try:
        for name in _FUNCTIONS:
            getattr(library, name)
        library.spd_source.restype = ctypes.c_char_p
        found = library.spd_source()
    except AttributeError as error:
        raise OSError(f"{path} holds other functions than the kernels: {error}") from error
    if found != source.encode():
        raise OSError(f"{path} was compiled from another source ({found!r}; wanted {source!r})")
    return library
