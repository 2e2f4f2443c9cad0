"""The environment variable that chooses the kernels."""

from __future__ import annotations

import os

SWITCH = "SHARDED_SPD_KERNELS"
"""Environment variable: which kernels are used.

- auto: on each device the fastest that are there.
- reference: plain torch everywhere.
- cpu: as auto, but no compiled kernels for tensors in host memory is an error.
- triton: as auto, but no Triton for tensors on a GPU is an error; with TRITON_INTERPRET=1 it takes those in
  host memory too.
"""

CHOICES = ("auto", "reference", "cpu", "triton")


def choice() -> str:
    """What the environment asks for.

    Raises:
        RuntimeError: where that is none of `CHOICES`.
    """
    chosen = os.environ.get(SWITCH, "auto")
    if chosen not in CHOICES:
        raise RuntimeError(f"{SWITCH}: got {chosen!r}; wanted {', '.join(CHOICES[:-1])} or {CHOICES[-1]}")
    return chosen
