"""Starting a function on several real processes that can talk to each other."""

from __future__ import annotations

import json
import multiprocessing as mp
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

_PRELOAD = [
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.testing._internal.distributed.fake_pg",
    "sharded_spd.anchors",
]
"""Imported once, by the process that all ranks are forked from."""


def launch(function: str, world: int, arguments: tuple[Any, ...], limit: float = 3600.0) -> Any:
    """What `function(rank, folder, *arguments)` returned on rank 0, which has to be JSON.

    `function` is named "module:function", so that only the ranks have to import it.

    Raises:
        RuntimeError: with the traceback of the rank that failed first.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory(prefix="spd-bench-") as name:
        folder = Path(name)
        ranks = [
            context.Process(target=_main, args=(rank, folder, function, arguments), daemon=True)
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, folder, limit)
            return json.loads((folder / "result.json").read_text())
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _wait(ranks: list[Any], folder: Path, limit: float) -> None:
    until = time.monotonic() + limit
    while True:
        running = any(process.exitcode is None for process in ranks)
        failed = [r for r, process in enumerate(ranks) if process.exitcode not in (None, 0)]
        if failed:
            path = folder / f"error{failed[0]}.txt"
            text = path.read_text() if path.exists() else "no traceback: it was killed (memory?)"
            raise RuntimeError(f"rank {failed[0]} ended with code {ranks[failed[0]].exitcode}:\n{text}")
        if not running:
            break
        if time.monotonic() > until:
            raise RuntimeError(f"the ranks took longer than {limit:.0f} s; wanted an end")
        time.sleep(0.02)
    if not (folder / "result.json").exists():
        raise RuntimeError("rank 0 left no result")


def _main(rank: int, folder: Path, function: str, arguments: tuple[Any, ...]) -> None:
    try:
        module, _, name = function.partition(":")
        result = getattr(import_module(module), name)(rank, folder, *arguments)
        if rank == 0:
            (folder / "partial.json").write_text(json.dumps(result))
            (folder / "partial.json").rename(folder / "result.json")
    except BaseException:
        (folder / f"error{rank}.txt").write_text(traceback.format_exc())
        sys.exit(1)
