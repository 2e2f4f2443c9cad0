"""Strict loading and validation of the configuration."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import pytest

from sharded_spd.config import AnchorConfig, LayerConfig, SPDConfig, TelemetryConfig, load_config
from sharded_spd.config.loading import parse_yaml
from sharded_spd.errors import ConfigError

FULL = r"""
rule: spd
rule_options: {k: 3e-1}
weight_decay: 2
max_pull: 1.0
anchor: {source: /models/vit, dtype: bfloat16, device: cpu}
anchor_missing: zero
layers:
  - {pattern: "head\\..*", rule: decay, weight_decay: 1e-2}
  - {pattern: ".*lora_.*", anchor: zero}
telemetry: {every: 10, path: spd.jsonl}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_reads_every_setting(tmp_path):
    assert load_config(write(tmp_path, FULL)) == SPDConfig(
        rule="spd",
        rule_options={"k": 0.3},
        weight_decay=2.0,
        max_pull=1.0,
        anchor=AnchorConfig(source="/models/vit", dtype="bfloat16", device="cpu"),
        anchor_missing="zero",
        layers=(
            LayerConfig(pattern=r"head\..*", rule="decay", weight_decay=0.01),
            LayerConfig(pattern=".*lora_.*", anchor=AnchorConfig(source="zero")),
        ),
        telemetry=TelemetryConfig(every=10, path="spd.jsonl"),
    )


@pytest.mark.parametrize("text", ["", "# nothing but a remark\n", "{}", "---\n"])
def test_empty_file_gives_the_defaults(tmp_path, text):
    assert load_config(write(tmp_path, text)) == SPDConfig()
    assert load_config({}) == SPDConfig()


def test_mapping_and_file_agree(tmp_path):
    assert load_config(parse_yaml(FULL)) == load_config(str(write(tmp_path, FULL)))


def test_bare_anchor_is_its_source():
    assert load_config({"anchor": "zero"}).anchor == AnchorConfig(source="zero")
    assert SPDConfig(anchor="zero").anchor == AnchorConfig(source="zero")
    assert SPDConfig(anchor=Path("/models/vit")).anchor.source == "/models/vit"


def test_anchor_store_is_taken_as_it_is():
    class Store:
        source = "mine"

        def problems(self, shapes):
            return []

        def fetch(self, piece):
            return None

    store = Store()
    assert load_config({"anchor": store}).anchor.source is store
    assert load_config({"anchor": {"source": store}}).anchor.source is store


@pytest.mark.parametrize(
    ("data", "path", "near"),
    [
        ({"weight_dcay": 1.0}, "weight_dcay", "'weight_decay'"),
        ({"lambda": 1.0}, "lambda", "'weight_decay'"),
        ({"anchor": {"sorce": "zero"}}, "anchor.sorce", "'source'"),
        ({"layers": [{"pattern": "a"}, {"patern": "b"}]}, "layers[1].patern", "'pattern'"),
        ({"layers": [{"pattern": "a", "anchor": {"dtpye": "auto"}}]}, "layers[0].anchor.dtpye", "'dtype'"),
        ({"telemetry": {"evry": 1}}, "telemetry.evry", "'every'"),
    ],
)
def test_unknown_key_names_its_path_and_the_nearest_key(data, path, near):
    with pytest.raises(ConfigError) as error:
        load_config(data)
    assert str(error.value).startswith(f"{path}: unknown key")
    assert f"did you mean {near}?" in str(error.value)


def test_the_old_name_of_the_reduction_warns_and_means_the_same():
    for old, new in ((True, "per_step"), (False, "per_inner_step")):
        with pytest.warns(FutureWarning, match=f"defer: {str(old).lower()} is reduction: {new}"):
            assert load_config({"defer": old}) == SPDConfig(reduction=new)
    with pytest.raises(ConfigError, match="wanted reduction alone"):
        SPDConfig(defer=False, reduction="per_step")
    with pytest.raises(ConfigError, match="defer: wanted true or false"):
        SPDConfig(defer="no")


def test_unknown_key_unlike_any_lists_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"^zzz: unknown key; known here: anchor, anchor_missing, defer, layers, "
    ):
        load_config({"zzz": 1})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"weight_decay": -1}, r"^weight_decay: wanted a finite number, 0 or more, got -1 \(int\)"),
        ({"weight_decay": math.nan}, r"^weight_decay: .*got nan"),
        ({"weight_decay": math.inf}, r"^weight_decay: .*got inf"),
        ({"weight_decay": "strong"}, r"^weight_decay: .*got 'strong' \(str\)"),
        ({"weight_decay": True}, r"^weight_decay: .*got True \(bool\)"),
        ({"weight_decay": None}, r"^weight_decay: .*got None"),
        ({"max_pull": 0}, r"^max_pull: wanted a positive number"),
        ({"anchor": {"fingerprint": "12ab"}}, r"^anchor\.fingerprint: wanted 32 hexadecimal .*got '12ab'"),
        ({"anchor": {"fingerprint": 1234}}, r"^anchor\.fingerprint: .*quotes.*got 1234 \(int\)"),
        ({"anchor": {"source": "zero", "fingerprint": "0" * 32}}, r"^anchor\.fingerprint: source zero"),
        ({"max_pull": math.nan}, r"^max_pull: .*got nan"),
        ({"rule": 3}, r"^rule: wanted the name of a rule or a rule object, got 3 \(int\)"),
        ({"rule": ""}, r"^rule: .*got ''"),
        ({"rule_options": [1]}, r"^rule_options: wanted a mapping"),
        ({"rule_options": {1: 2}}, r"^rule_options\.1: keys are strings"),
        ({"anchor": 3}, r"^anchor: wanted a source or a mapping"),
        ({"anchor": None}, r"^anchor: .*got None"),
        ({"anchor": {"source": ""}}, r"^anchor\.source: .*got ''"),
        ({"anchor": {"dtype": "floatt32"}}, r"^anchor\.dtype: .*did you mean 'float32'\?"),
        ({"anchor": {"device": "gpu"}}, r"^anchor\.device: wanted one of auto, cpu, disk, got 'gpu'"),
        ({"anchor_missing": "ignore"}, r"^anchor_missing: wanted one of raise, zero, got 'ignore'"),
        ({"layers": {"pattern": "a"}}, r"^layers: wanted a list"),
        ({"layers": "head"}, r"^layers: wanted a list.*got 'head' \(str\)"),
        ({"layers": None}, r"^layers: wanted a list.*got None"),
        ({"layers": ["head"]}, r"^layers\[0\]: wanted a mapping of settings, got 'head'"),
        ({"layers": [{"rule": "decay"}]}, r"^layers\[0\]\.pattern: is required"),
        (
            {"layers": [{"pattern": "*.bias"}]},
            r"^layers\[0\]\.pattern: .*not a valid regular exp.*not a glob",
        ),
        ({"layers": [{"pattern": 7}]}, r"^layers\[0\]\.pattern: wanted a regular expression, got 7"),
        ({"layers": [{"pattern": "a", "weight_decay": -1}]}, r"^layers\[0\]\.weight_decay: "),
        ({"layers": [{"pattern": "a", "anchor": {"dtype": 1}}]}, r"^layers\[0\]\.anchor\.dtype: "),
        ({"telemetry": 5}, r"^telemetry: wanted a mapping of settings, got 5"),
        ({"telemetry": {"every": -1}}, r"^telemetry\.every: .*got -1"),
        ({"telemetry": {"every": 1.5}}, r"^telemetry\.every: .*got 1\.5"),
        ({"telemetry": {"path": "x.jsonl"}}, r"^telemetry\.every: is 0 \(off\) although a path is given"),
        ({1: 2}, r"^1: keys are strings, got 1 \(int\)"),
        ({True: 2}, r"^True: keys are strings"),
    ],
)
def test_bad_value_says_where_what_was_got_and_what_was_wanted(data, message):
    with pytest.raises(ConfigError, match=message):
        load_config(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rule: spd\nrule: l2sp\n", r"'rule' is given twice"),
        ("anchor: {dtype: auto, dtype: float32}\n", r"'dtype' is given twice"),
        ("rule: [spd\n", r"not valid YAML"),
        ("- rule: spd\n", r"top level: wanted a mapping of settings, got \["),
        ("just words\n", r"top level: .*got 'just words'"),
        ("rule: spd\n---\nrule: l2sp\n", r"not valid YAML"),
        ("[1, 2]: 3\n", r"(?s)not valid YAML: .*unhashable"),
        ("rule: !!python/object/apply:os.getcwd []\n", r"not valid YAML: could not determine a constructor"),
    ],
)
def test_bad_file_names_itself(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert str(error.value).startswith(str(path))


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"rule: \xff\xfe\n")
    with pytest.raises(ConfigError, match="not a text file in UTF-8"):
        load_config(tmp_path / "latin.yaml")
    with pytest.raises(ConfigError, match=r"wanted a path or a mapping, got 7 \(int\)"):
        load_config(7)


def test_config_is_frozen_keyword_only_and_travels():
    config = load_config(parse_yaml(FULL))
    with pytest.raises(AttributeError):
        config.rule = "l2sp"
    with pytest.raises(TypeError):
        SPDConfig("spd")
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert isinstance(hash(config.anchor), int)


def test_options_are_copied():
    options = {"k": 1.0}
    config = SPDConfig(rule_options=options)
    options["k"] = 2.0
    assert config.rule_options == {"k": 1.0}
