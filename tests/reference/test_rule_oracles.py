"""The oracle of FTP against the golden trajectories."""

from __future__ import annotations

import pytest
from torch.testing import assert_close

from tests.reference.golden import FTP_FILES, read_ftp
from tests.reference.oracle import LayerOptions
from tests.reference.rule_oracles import FTPOracle, RuleOracle


def test_every_ftp_file_is_there() -> None:
    """A matrix over no files would pass."""
    assert len(FTP_FILES) == 3


@pytest.mark.parametrize("stem", FTP_FILES)
def test_ftp_oracle_follows_golden(stem: str) -> None:
    """To 1e-12: both are float64. The published optimizer decays as AdamW does, also what is excluded."""
    ref = read_ftp(stem)
    options = LayerOptions(lr=ref.lr, weight_decay=ref.weight_decay)
    kept = {name: w for name, w in ref.init.items() if name not in ref.excluded}
    rest = {name: w for name, w in ref.init.items() if name in ref.excluded}
    common = {"decays": True, "momentum": ref.momentum}
    oracles = [
        FTPOracle(kept, ref.anchors, options, k=ref.k, **common),
        RuleOracle(rest, ref.anchors, options, **common),
    ]
    for grads, want in zip(ref.grads, ref.params, strict=True):
        for oracle in oracles:
            oracle.step({name: grads[name] for name in oracle.weights})
        assert_close({**oracles[0].weights, **oracles[1].weights}, want, rtol=1e-12, atol=1e-13)
