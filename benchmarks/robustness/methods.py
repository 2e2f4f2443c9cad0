"""The methods that are compared, and among which settings each is tuned: four, from weak to strong."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A method's name in the table, the settings of its job, and those that it is tuned by.

    `rule`: what the job calls it. Each of `candidates` is a set of settings on top of `settings`.
    """

    name: str
    rule: str
    candidates: tuple[tuple[str, ...], ...]
    settings: tuple[str, ...] = ()


def _strengths(*values: float) -> tuple[tuple[str, ...], ...]:
    return tuple((f"spd.weight_decay={value:g}",) for value in values)


ADAMW = "AdamW"
LOW = "AdamW-low-lr"
LR_TIMES = "train.lr*="
"""Begins a candidate that is a factor of the recipe's own learning rate."""
LR_FACTORS = (2, 0.5, 0.125, 0.03125)
_LRS = tuple((f"{LR_TIMES}{v:g}",) for v in LR_FACTORS)
WISE = "WiSE-FT"
ALPHAS = (0.8, 0.6, 0.4, 0.2)
"""What WiSE-FT is tuned by: shares of the fine-tuned weights, in AdamW's own checkpoints."""

_RADII = ((0, 1e-2), (1, 1e-2), (1, 1e-3), (1, 1e-4))
"""FTP's k and mu: whether the radius may shrink again, and how fast it changes."""
_NO_FURTHER = ("spd.max_pull=1.0",)

METHODS = (
    Method(ADAMW, "adamw", _LRS),
    Method(LOW, "adamw", _LRS),
    Method("LP-FT", "adamw", _LRS, ("head_first.epochs=10",)),
    Method("L2-SP", "l2sp", _strengths(8, 40, 200, 1000), _NO_FURTHER),
    Method("SPD", "spd", _strengths(1, 8, 64, 512), _NO_FURTHER),
    Method("MAPS", "maps", _strengths(1, 8, 64, 512), _NO_FURTHER),
    Method(
        "FTP",
        "ftp",
        tuple((f"spd.rule_options.k={k}", f"spd.rule_options.mu={mu:g}") for k, mu in _RADII),
    ),
    Method("DiGraP", "digrap", tuple((f"spd.rule_options.mu={v:g}",) for v in (0.01, 0.1, 1, 10))),
    Method("CWD", "cwd", _strengths(8, 40, 200, 1000), _NO_FURTHER),
)
"""All but WiSE-FT, which needs no training of its own.

AdamW has the learning rate that the validation set likes best; AdamW-low-lr the lowest that is as good, for
small steps stay close to the start too. LP-FT has learning rates of its own, all others have AdamW's.
"""


_SHARES, _FACTORS = _strengths(0.03, 0.1, 0.3, 0.6), _strengths(8, 40, 200, 1000)
VARIANTS = (
    Method("spd-rows", "spd-rows", _strengths(1, 8, 64, 512), _NO_FURTHER),
    Method("spd-elements", "spd-elements", _strengths(0.5, 0.8, 0.95, 1), _NO_FURTHER),
    Method("growth", "growth", _strengths(0.5, 0.8, 0.95, 1), _NO_FURTHER),
    Method("update-gate", "update-gate", _FACTORS, _NO_FURTHER),
    Method("gated-l2", "gated-l2", _FACTORS, _NO_FURTHER),
    Method("l2-depth", "l2-depth", _FACTORS, _NO_FURTHER),
    Method("drag", "drag", _SHARES, _NO_FURTHER),
    Method("drag-gated", "drag-gated", _SHARES, _NO_FURTHER),
    Method("drag-rows", "drag-rows", _SHARES, _NO_FURTHER),
    Method("drag-elements", "drag-elements", _SHARES, _NO_FURTHER),
    Method("drag-depth", "drag-depth", _SHARES, _NO_FURTHER),
    Method("spd-half", "spd", _strengths(1, 8, 64, 512), ("spd.max_pull=0.5",)),
    Method("spd-tenth", "spd", _strengths(1, 8, 64, 512), ("spd.max_pull=0.1",)),
    Method("spd-running", "spd-running", _strengths(1, 8, 64, 512), _NO_FURTHER),
    Method("spd-cosine", "spd-cosine", _strengths(8, 64, 512, 4096), _NO_FURTHER),
    Method("drag-cosine", "drag-cosine", _strengths(1, 4, 16, 64), _NO_FURTHER),
    Method("unsure", "unsure", _FACTORS, _NO_FURTHER),
    Method("unsure-squared", "unsure-squared", _FACTORS, _NO_FURTHER),
)
"""What `search.py` tries, of the rules in `variants.py`."""


def by_name(name: str) -> Method:
    """The method that is called so."""
    return next(method for method in (*METHODS, *VARIANTS) if method.name == name)
