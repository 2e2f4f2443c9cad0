"""The package's own exceptions, subclasses of those that plain handlers catch, and a hint that many give."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A configuration that cannot be honoured: unknown key, bad value, pattern that matches nothing."""


class AnchorError(ValueError):
    """An anchor that does not fit the model: missing, misshapen, truncated, taken at the wrong time."""


class BindingError(RuntimeError):
    """Parameters that the projector is not, or no longer, bound to."""


class UnsupportedError(TypeError):
    """An optimizer, tensor or engine setting under which the method would be silently wrong."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, is damaged, or does not fit what it is to be loaded into."""


def did_you_mean(got: object, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """What to say of the nearest of `known`, behind a message; nothing where none is near."""
    near = difflib.get_close_matches(str(got), list(known), 1, cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""


_USUAL_CAUSE = "another pre-trained model or revision, or weights loaded before the anchor was taken"


def another_anchor(
    where: str, whose: str, *, wanted: str, got: str, advice: str, cause: str = _USUAL_CAUSE
) -> AnchorError:
    """Return the error for an anchor that has another fingerprint than was noted down for it.

    Args:
        where: which anchors: of the run, of a group, of layers.
        whose: what has it noted down, as in "the checkpoint's".
        wanted: the fingerprint there.
        got: that of the anchor here.
        advice: what to do about it.
        cause: how it may have come about.
    """
    return AnchorError(
        f"{where}: another anchor than {whose}: wanted fingerprint {wanted}, got {got}: {cause}; {advice}"
    )
