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
WISE = "WiSE-FT"
ALPHAS = (0.8, 0.6, 0.4, 0.2)
"""What WiSE-FT is tuned by: shares of the fine-tuned weights, in AdamW's own checkpoints."""

METHODS = (
    Method(ADAMW, "adamw", tuple((f"train.adamw_weight_decay={v:g}",) for v in (0, 0.01, 0.1, 1))),
    Method("LP-FT", "adamw", tuple((f"head_first.epochs={v}",) for v in (2, 5, 10, 20))),
    Method("L2-SP", "l2sp", _strengths(1, 3, 10, 30)),
    Method("SPD", "spd", _strengths(2, 4, 8, 16), ("spd.max_pull=1.0",)),
    Method("MAPS", "maps", _strengths(2, 4, 8, 16), ("spd.max_pull=1.0",)),
    Method("FTP", "ftp", tuple((f"spd.rule_options.k={v:g}",) for v in (1, 0.3, 0.1, 0))),
    Method("DiGraP", "digrap", tuple((f"spd.rule_options.mu={v:g}",) for v in (0.001, 0.01, 0.1, 1))),
    Method("CWD", "cwd", _strengths(1, 3, 10, 30)),
)
"""All but WiSE-FT, which needs no training of its own.

LP-FT's head is trained with ten times the learning rate (`settings.py`).
"""


def by_name(name: str) -> Method:
    """The method that is called so."""
    return next(method for method in METHODS if method.name == name)
