"""`python -m tests.fuzz.atheris_run TARGET -runs=N`: one reader under atheris, which follows its coverage."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["sharded_spd"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """The first byte of an input says how the rest is used: as the file, or as choices of damage to it."""
    name, *options = sys.argv[1:]
    folder = Path(tempfile.mkdtemp(prefix="spd-fuzz-"))
    target = TARGETS[name](folder)
    assert target.run(target.valid), "the undamaged file was refused"
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "valid").write_bytes(b"\0" + target.valid)
    for number in range(20):
        (corpus / f"damage{number}").write_bytes(bytes([1, number]))

    def one(data: bytes) -> None:
        if data[:1] == b"\0":
            target.run(data[1:])
        else:
            target.run(target.case(Random(data)))

    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
