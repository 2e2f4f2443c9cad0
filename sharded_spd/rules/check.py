"""The check of a rule's options."""

from __future__ import annotations

import math

from sharded_spd.errors import ConfigError


def check_range(rule: str, option: str, value: object, *, least: float, above: bool = False) -> None:
    """Raise ConfigError unless `value` is a finite number >= `least` (`above`: > `least`)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not (value > least if above else value >= least):  # type: ignore[operator]
        wanted = f"a number {'>' if above else '>='} {least:g}"
        raise ConfigError(f"got {option}={value!r} for rule {rule!r}; wanted {wanted}")
