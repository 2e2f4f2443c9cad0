"""Where between two checkpoints: the alphas of a command line, and the folder of each."""

from __future__ import annotations

import math
import os
from pathlib import Path

from sharded_spd.errors import AnchorError

_MOST = 1000


def parse_alphas(text: str) -> list[float]:
    """The numbers of "0.5", "0,0.3,1" or "0:1:0.1".

    The last form is first, first + step, ... as far as last: 0:1:0.1 ends at 1, 0:1:0.3 at 0.9. Below 0 and
    above 1 the checkpoints lie beyond the two.

    Raises:
        AnchorError: it is none of these, or two of them would have the same folder.
    """
    wanted = f"alpha: wanted a number, numbers with commas, or first:last:step, got {text!r}"
    try:
        parts = [float(part) for part in text.split(":")] if ":" in text else []
        numbers = [] if parts else [float(part) for part in text.split(",")]
    except ValueError:
        raise AnchorError(wanted) from None
    if parts:
        if len(parts) != 3 or not all(map(math.isfinite, parts)) or parts[2] <= 0 or parts[1] < parts[0]:
            raise AnchorError(wanted)
        first, last, step = parts
        count = (last - first) / step + 1e-9
        if not count < _MOST:
            raise AnchorError(f"alpha: {text} is {count + 1:.0f} checkpoints; wanted at most {_MOST}")
        numbers = [round(first + i * step, 10) for i in range(math.floor(count) + 1)]
    if not numbers or not all(map(math.isfinite, numbers)):
        raise AnchorError(f"{wanted}; each finite")
    named: dict[str, float] = {}
    for number in numbers:
        name = folder_of("", number).name
        if name in named:
            raise AnchorError(
                f"alpha: {named[name]!r} and {number!r} would both be {name}: wanted each once, and no two "
                "that differ only after the tenth digit"
            )
        named[name] = number
    return [number + 0.0 for number in numbers]  # -0 is 0


def folder_of(output: str | os.PathLike[str], alpha: float) -> Path:
    """Where the checkpoint of one alpha goes: `output/alpha-0.3`."""
    return Path(output) / f"alpha-{alpha + 0.0:.10g}"
