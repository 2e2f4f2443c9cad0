"""Which modules of the package a call enters, and how often it goes from one to another."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import sharded_spd

_ROOT = f"{Path(sharded_spd.__file__).parent}/"


@dataclass
class StepPath:
    """`calls` of functions by module; `moves` are calls in another module than the call before."""

    calls: Counter[str] = field(default_factory=Counter)
    moves: int = 0

    def trace(self, action: Callable[[], object]) -> None:
        """Run `action` and count."""
        last = ""

        def count(frame: FrameType, event: str, _: object) -> None:
            nonlocal last
            file = frame.f_code.co_filename
            if event == "call" and file.startswith(_ROOT):
                module = file.removeprefix(_ROOT)
                self.calls[module] += 1
                self.moves += module != last
                last = module

        before = sys.getprofile()
        sys.setprofile(count)
        try:
            action()
        finally:
            sys.setprofile(before)

    def __str__(self) -> str:
        """The modules, those with most calls first."""
        lines = [f"{number:5} {module}" for module, number in self.calls.most_common()]
        return "\n".join([f"{len(self.calls)} modules, {self.moves} moves between them", *lines])
