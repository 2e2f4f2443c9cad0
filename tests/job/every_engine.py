"""A rank that runs several jobs one after the other, and says how each of them ended.

Usage: torchrun --nproc-per-node 2 every_engine.py OUT '{"case": ["job.yaml", "train.lr=1e-4", ...], ...}'
"""

import json
import os
import sys
from pathlib import Path

from sharded_spd.errors import ConfigError
from sharded_spd.finetune.config import load_job
from sharded_spd.finetune.run.job import _Job, check_job, quiet_libraries
from sharded_spd.finetune.world import StopRequest, join_world


def main() -> None:
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    quiet_libraries()
    with StopRequest().listening() as stop, join_world("cpu") as world:
        ended = {}
        for name, (job, *settings) in cases.items():
            config = load_job(job, [*settings, f"output_dir={out / name}", f"ranks={world.size}"])
            try:
                check_job(config)
                ended[name] = str(_Job(config, world, stop, None).run())
            except ConfigError as error:
                ended[name] = str(error)
        (out / f"ended-{world.rank}.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # as the command does: gloo's threads may hang in the interpreter's own ending
