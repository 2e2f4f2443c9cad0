"""How much of a long reading or writing is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from sharded_spd.anchors.tools.scan import Progress as Report


@contextmanager
def showing(what: str, *, total: int | None = None) -> Iterator[Report]:
    """A line on the terminal of how many bytes are done; nothing where the output is no terminal."""
    columns = (TextColumn(what), DownloadColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task(what, total=total)
        yield lambda num_bytes: shown.advance(task, num_bytes)
