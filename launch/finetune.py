#!/usr/bin/env python
"""The fine-tuning job as a script, for launchers that start scripts.

deepspeed --num_gpus 2 launch/finetune.py my.yaml engine=@configs/engines/deepspeed.yaml

The arguments are those of `sharded-spd finetune`; --local_rank is dropped, because the environment has it.
"""

import sys

from sharded_spd.cli import main

if __name__ == "__main__":
    given = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    sys.argv = [sys.argv[0], "finetune", *given]
    main()
