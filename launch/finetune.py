#!/usr/bin/env python
"""The fine-tuning job as a script, for launchers that start scripts.

deepspeed --num_gpus 2 launch/finetune.py my.yaml engine=@configs/engines/deepspeed.yaml

Takes the arguments of `sharded-spd finetune`, without the deepspeed launcher's --local_rank (see the environment).
"""

import sys

from sharded_spd.cli import main

if __name__ == "__main__":
    given = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    sys.argv = [sys.argv[0], "finetune", *given]
    main()
