"""Progress of a long read or write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from sharded_spd.anchors.tools.scan import Progress as Report


@contextmanager
def showing(what: str, *, total: int | None = None) -> Iterator[Report]:
    """A terminal line with the bytes done; nothing if the output is not a terminal."""
    columns = (TextColumn(what), DownloadColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task(what, total=total)
        yield lambda num_bytes: shown.advance(task, num_bytes)
