"""Cases of the matrix as a script, for a launcher that starts the ranks itself: prints one line per case."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.parity import zero_cases as cases
from tests.support.engines import Engine
from tests.support.zero import OFFLOAD, Setting


def main(scratch: Path) -> None:
    """Run them all; a failure ends the script with its traceback."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    engine = Engine(scratch)
    for setting in (
        Setting(stage=1),
        Setting(stage=2, dtype="bf16", zero=OFFLOAD),
        Setting(stage=3, zero={"sub_group_size": 20}),
    ):
        cases.agrees(engine, setting=setting, grouped=True)
        if engine.rank == 0:
            print(f"agrees: stage {setting.stage}, {engine.world} ranks", flush=True)
    cases.settings_in_json(engine, setting=Setting(stage=2))
    if engine.rank == 0:
        print("settings in the JSON", flush=True)
    os._exit(0)  # gloo's teardown, which aborts now and then, is not what is tested


if __name__ == "__main__":
    main(Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))))
