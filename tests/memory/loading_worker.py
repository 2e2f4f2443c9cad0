"""A rank that loads models and says by how much its memory grew at most: JOB.yaml OUT CASES."""

import gc
import json
import sys
from pathlib import Path

import torch

from sharded_spd.finetune.config import load_job
from sharded_spd.finetune.engines.registry import engine_factory
from sharded_spd.finetune.run.live import loads_shards
from sharded_spd.finetune.tasks.loading import Weights
from sharded_spd.finetune.tasks.registry import make_task
from sharded_spd.finetune.world import join_world


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def main() -> None:
    job, out, cases = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    with join_world("cpu") as world:
        grown = {}
        for name, settings in cases.items():
            config = load_job(job, settings)
            task = make_task(config, world.device)
            directory = Path(config.checkpoint or "")
            task.model_config(directory)
            gc.collect()
            torch.distributed.barrier()
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
            before = status("VmRSS")
            loaded = task.load(directory, seed=0, empty=loads_shards(config, world))
            weights = None if loaded.whole else Weights(loaded, directory)
            engine = engine_factory(config.engine, world, config.train)(loaded.model, weights)
            grown[name] = status("VmHWM") - before
            del engine, loaded, weights
        (out / f"grown-{world.rank}.json").write_text(json.dumps(grown))


if __name__ == "__main__":
    main()
