"""Typing errors for texts, the same ones for a text and a seed on every machine."""

from __future__ import annotations

import random
import re

_WORD = re.compile(r"[A-Za-z]{4,}")
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def add_typing_errors(text: str, *, share: float, seed: int) -> str:
    """One error in a `share` of the words of four letters or more, and in one of them at least.

    An error: two letters swapped, one left out, one doubled, or the key beside it. First letters stay.
    """
    draw = random.Random(f"{seed}/{text}")  # by value: a hash of the text, not of the process
    places = [match.span() for match in _WORD.finditer(text)]
    chosen = {span for span in places if draw.random() < share}
    if places and not chosen:
        chosen = {draw.choice(places)}
    parts, at = [], 0
    for start, stop in sorted(chosen):
        parts += [text[at:start], _mistyped(text[start:stop], draw)]
        at = stop
    return "".join([*parts, text[at:]])


def _mistyped(word: str, draw: random.Random) -> str:
    at = draw.randrange(1, len(word))
    kind = draw.choice(("swap", "leave out", "double", "beside"))
    if kind == "swap":
        at = min(at, len(word) - 2)
        if word[at] != word[at + 1]:
            return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        kind = "leave out"  # two equal letters look the same when they are swapped
    if kind == "leave out":
        return word[:at] + word[at + 1 :]
    if kind == "double":
        return word[:at] + word[at] + word[at:]
    row = next(row for row in _ROWS if word[at].lower() in row)
    near = row.index(word[at].lower()) + draw.choice((-1, 1))
    return word[:at] + row[near if 0 <= near < len(row) else len(row) - 2 if near > 0 else 1] + word[at + 1 :]
