"""The rules beside SPD under DeepSpeed, where several layers lie in one flat partition."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.parity import rule_cases
from tests.parity.cases import tensors
from tests.parity.zero_cases import drawn, rounded
from tests.support.compare import assert_layers_close
from tests.support.engines import Engine
from tests.support.training import config_of
from tests.support.zero import Setting, ZeroTraining


def rule(engine: Engine, *, setting: Setting, name: str, per_step: bool) -> None:
    """As the oracle does, to 2e-7 of a layer's norm: two units in the last place of float32."""
    start = rounded(tensors(dtype=torch.float32), setting)
    own, oracle = rule_cases.setup(name, "attached", start)
    options = dict.fromkeys(start, own)
    config = replace(config_of(options, "snapshot"), reduction="per_step" if per_step else "per_inner_step")
    training = ZeroTraining(start, options, setting, config=config)
    pulled = 0
    for grads in drawn(setting, 8):
        training.step(grads)
        pulled += sum(stats.s != 0 for stats in oracle.step(grads).values())
    assert pulled >= 3
    assert_layers_close(training.masters(), oracle.weights, relative=2e-7)
    training.close()
