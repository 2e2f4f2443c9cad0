"""Comparisons per layer, with the figures that the method is held to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def assert_layers_close(
    got: Mapping[str, Tensor],
    want: Mapping[str, Tensor],
    *,
    start: Mapping[str, Tensor] | None = None,
    relative: float,
    of_change: float | None = None,
    label: str = "",
) -> None:
    """Norm-wise per layer: `|got - want| <= relative * |want|` and `<= of_change * |want - start|`."""
    assert set(got) == set(want), f"layers differ: {set(got) ^ set(want)}"
    bad = []
    for name, reference in want.items():
        reference = reference.double()
        error = float((got[name].double() - reference).norm())
        limit = relative * float(reference.norm())
        if of_change is not None and start is not None:
            limit = min(limit, of_change * float((reference - start[name].double()).norm()))
        if not error <= limit:
            bad.append(
                f"{name}: |x - ref| = {error:.3e} > {limit:.3e} (|ref| = {float(reference.norm()):.3e})"
            )
    assert not bad, f"{label} {len(bad)} of {len(want)} layers off:\n" + "\n".join(bad)


def assert_float64_parity(got: Mapping[str, Tensor], want: Mapping[str, Tensor], *, label: str = "") -> None:
    """1e-10: only the order of float64 sums may differ."""
    assert_layers_close(got, want, relative=1e-10, label=label)


def assert_float32_parity(
    got: Mapping[str, Tensor], want: Mapping[str, Tensor], start: Mapping[str, Tensor], *, label: str = ""
) -> None:
    """2e-6 of the weights and 2e-5 of what training changed: float32 rounding over a dozen steps."""
    assert_layers_close(got, want, start=start, relative=2e-6, of_change=2e-5, label=label)


def assert_bits_equal(got: Mapping[str, Tensor], want: Mapping[str, Tensor], *, label: str = "") -> None:
    """Every bit."""
    assert set(got) == set(want), f"layers differ: {set(got) ^ set(want)}"
    off = [name for name in want if not torch.equal(got[name], want[name])]
    assert not off, f"{label} layers differ: {off}"
