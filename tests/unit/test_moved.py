"""Names of the release before: each still gives what it gave, and says where that is now."""

import subprocess
import sys
from importlib import import_module

import pytest

import sharded_spd
from sharded_spd._moved import MOVED
from sharded_spd.rules.statistics import Statistic


@pytest.mark.parametrize("old", MOVED)
def test_an_old_module_gives_what_the_new_ones_have(old: str) -> None:
    sys.modules.pop(f"sharded_spd.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"sharded_spd.{old} is sharded_spd.{MOVED[old][0]}"):
        module = import_module(f"sharded_spd.{old}")
    for home in MOVED[old]:
        new = import_module(f"sharded_spd.{home}")
        for name in (n for n in vars(new) if not n.startswith("__")):
            assert getattr(module, name) is getattr(new, name)
    with pytest.raises(AttributeError, match="no_such_thing"):
        getattr(module, "no_such_thing")  # noqa: B009


@pytest.mark.parametrize(
    "line",
    [
        "from sharded_spd.stats import DELTA_SQ, row_count, all_reduce_",
        "import sharded_spd.stats; sharded_spd.stats.Statistic",
    ],
)
def test_in_every_form_of_import(line: str) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "always", "-c", line], capture_output=True, text=True, check=True, timeout=60
    )
    assert "<string>:1: DeprecationWarning: sharded_spd.stats is" in run.stderr


def test_as_an_attribute() -> None:
    sys.modules.pop("sharded_spd.stats", None)
    vars(sharded_spd).pop("stats", None)
    with pytest.warns(DeprecationWarning, match=r"sharded_spd.stats is"):
        assert sharded_spd.stats.Statistic is Statistic


def test_the_package_itself_uses_no_old_name() -> None:
    code = "import sharded_spd.cli, sharded_spd.checkpoint, sharded_spd.finetune.run.job"
    subprocess.run([sys.executable, "-W", "error:sharded_spd", "-c", code], check=True, timeout=120)


def test_no_other_name() -> None:
    with pytest.raises(ModuleNotFoundError):
        import_module("sharded_spd.statistics")
