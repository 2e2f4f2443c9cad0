"""One rank's reading of its quarter of a checkpoint, in a process of its own; prints what it cost in memory.

Usage: python -m tests.memory.anchor_worker CHECKPOINT RANK WORLD_SIZE sliced|whole
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from sharded_spd.anchors.files import FileAnchor
from sharded_spd.sharding.layout import Box, FlatRange, ShardSlice

MIB = 1 << 20
SHAPES = {
    "rows": (16384, 4096),  # split by rows, as FSDP2 does
    "columns": (16384, 4096),  # split by columns, as tensor parallelism does
    "vector": (1 << 26,),  # one long vector, cut anywhere, as flat engines do
    "wide": (2, 1 << 25),  # rows of 128 MiB, split within
}
PERIOD = 8191


def memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def pieces(rank: int, world: int) -> list[ShardSlice]:
    height, width = SHAPES["rows"]
    length = SHAPES["vector"][0]
    wide = SHAPES["wide"][1]
    # Unaligned cuts: rank r begins r elements late.
    start, end = (r * length // world + r if r < world else length for r in (rank, rank + 1))
    boxes = {
        "rows": Box((rank * height // world, 0), (height // world, width)),
        "columns": Box((0, rank * width // world), (height, width // world)),
        "wide": Box((0, rank * wide // world), (2, wide // world)),
    }
    result = [ShardSlice(name, 0, math.prod(box.sizes), box) for name, box in boxes.items()]
    return [*result, ShardSlice("vector", 0, end - start, FlatRange(start))]


def expected(piece: ShardSlice) -> torch.Tensor:
    """Return the values that the checkpoint was written with: the flat index modulo a prime."""
    if isinstance(piece.region, FlatRange):
        index = torch.arange(piece.region.start, piece.region.start + piece.numel)
    else:
        rows, columns = (
            torch.arange(o, o + n) for o, n in zip(piece.region.offsets, piece.region.sizes, strict=True)
        )
        index = (rows[:, None] * SHAPES[piece.layer][1] + columns).reshape(-1)
    return index.remainder_(PERIOD).float()


def main(path: str, rank: int, world: int, how: str) -> None:
    torch.set_num_threads(1)
    anchor = FileAnchor(path)
    anchor.fetch(ShardSlice("rows", 0, 1, FlatRange(0)))  # whatever the first use loads is no part of it
    with contextlib.suppress(OSError):  # without the reset the peak can only come out higher
        Path("/proc/self/clear_refs").write_text("5")
    baseline = memory("VmRSS")
    if how == "whole":
        files = sorted(Path(path).parent.glob("*.safetensors"))
        held = [tensor for file in files for tensor in load_file(file).values()]
        sum(float(tensor.sum()) for tensor in held)  # the files are mapped: only what is touched is read
        correct = len(held) == len(SHAPES)
    else:
        fetched = [(piece, anchor.fetch(piece)) for piece in pieces(rank, world)]
        held = [tensor for _, tensor in fetched]
    peak = memory("VmHWM")
    if how == "sliced":
        correct = all(torch.equal(tensor, expected(piece)) for piece, tensor in fetched)
    shard = sum(piece.numel for piece in pieces(rank, world)) * 4
    print(json.dumps({"increase": peak - baseline, "shard": shard, "correct": correct}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
