"""The random number generators of one rank as plain tensors, and back."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sharded_spd.errors import CheckpointError


def rng_state() -> dict[str, Tensor]:
    """The random state of torch (CPU and the current GPU), Python and, if loaded, NumPy."""
    version, numbers, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *numbers], dtype=torch.int64),
        "python_gauss": _optional(gauss),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        _, keys, position, has_gauss, cached = numpy.random.get_state()
        state["numpy"] = torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64)
        state["numpy_gauss"] = _optional(cached)
    return state


def set_rng_state(state: Mapping[str, Tensor]) -> None:
    """Restore a result of `rng_state`; generators that it lacks are left alone.

    Raises:
        CheckpointError: for a state that no generator takes.
    """
    try:
        _set(state)
    except (TypeError, ValueError, LookupError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"the saved random numbers are damaged: {error}") from None


def _set(state: Mapping[str, Tensor]) -> None:
    if "torch" in state:
        torch.set_rng_state(state["torch"])
    if "python" in state:
        version, *numbers = state["python"].tolist()
        random.setstate((version, tuple(numbers), _given(state["python_gauss"])))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    numpy: Any = sys.modules.get("numpy")
    if "numpy" in state and numpy is not None:
        *keys, position, has_gauss = state["numpy"].tolist()
        cached = state["numpy_gauss"].item()
        numpy.random.set_state(("MT19937", numpy.array(keys, dtype="uint32"), position, has_gauss, cached))


def _optional(x: float | None) -> Tensor:
    return torch.tensor(math.nan if x is None else x, dtype=torch.float64)


def _given(x: Tensor) -> float | None:
    return None if math.isnan(x.item()) else x.item()
