"""The job's configuration: overrides on top of a file, strict types, the blocks of each method."""

from pathlib import Path

import pytest

from sharded_spd.config.loading import build
from sharded_spd.errors import ConfigError
from sharded_spd.finetune.config import JobConfig, load_job

ROOT = Path(__file__).resolve().parents[3]
QUICKSTART = ROOT / "configs" / "recipes" / "quickstart.yaml"


def test_quickstart_says_what_the_guide_says() -> None:
    job = load_job(QUICKSTART)
    assert (job.engine.name, job.ranks, job.seeds, job.compare) == ("fsdp2", 2, (0, 1, 2), ("adamw", "spd"))
    assert job.pretrain is not None
    assert job.pretrain.min_accuracy == 0.9
    assert job.train.lr == 1e-3


def test_overrides_reach_into_blocks_and_are_yaml(tmp_path: Path) -> None:
    (tmp_path / "rule.yaml").write_text("rule: l2sp\nweight_decay: 7")
    job = load_job(
        QUICKSTART,
        [
            "train.lr=5e-5",
            "seeds=[4]",
            "engine.reshard_after_forward=true",
            "train.max_grad_norm=1",
            f"spd=@{tmp_path / 'rule.yaml'}",
            "compare=[]",
        ],
    )
    assert (job.train.lr, job.seeds, job.train.max_grad_norm) == (5e-5, (4,), 1.0)
    assert job.engine.options == {"reshard_after_forward": True}
    assert job.compare == ("l2sp",)
    assert job.spd_config("l2sp").weight_decay == 7


def test_option_of_an_engine_given_by_name_only() -> None:
    job = load_job(QUICKSTART, ["engine=fsdp2", "engine.cpu_offload=true"])
    assert (job.engine.name, job.engine.options) == ("fsdp2", {"cpu_offload": True})


def test_each_method_is_its_rule_with_the_shared_block() -> None:
    job = load_job(QUICKSTART, ["spd.weight_decay=3", "spd.anchor.dtype=bfloat16"])
    spd, l2sp = job.spd_config("spd"), job.spd_config("l2sp", 5.0)
    assert (spd.rule, spd.weight_decay) == ("spd", 3.0)
    assert (l2sp.rule, l2sp.weight_decay) == ("l2sp", 5.0)
    assert spd.anchor == l2sp.anchor
    assert (spd.anchor.source, spd.anchor.dtype) == ("checkpoint", "bfloat16")


@pytest.mark.parametrize("value", [True, "1", 1.5, None])
def test_whole_numbers_are_not_bent(value: object) -> None:
    with pytest.raises(ConfigError, match="ranks: wanted a whole number"):
        build(JobConfig, {"data": "digits", "checkpoint": "x", "ranks": value})


def test_required_and_unknown_keys_name_their_path() -> None:
    with pytest.raises(ConfigError, match=r"^data: is required"):
        build(JobConfig, {"checkpoint": "x"})
    with pytest.raises(ConfigError, match=r"^pretrain\.train\.epoch: unknown key; did you mean 'epochs'"):
        build(JobConfig, {"data": "digits", "pretrain": {"model": {}, "train": {"epoch": 3}}})
