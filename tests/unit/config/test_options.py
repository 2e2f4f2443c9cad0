"""FQN patterns to per-layer settings."""

from __future__ import annotations

import pytest

from sharded_spd.config import AnchorConfig, LayerConfig, SPDConfig
from sharded_spd.config.resolve import LayerOptions, resolve_layers
from sharded_spd.errors import ConfigError

FQNS = ("encoder.0.weight", "encoder.0.bias", "encoder.0.lora_A.weight", "head.weight", "head.bias")


def config(*layers: LayerConfig, **general) -> SPDConfig:
    return SPDConfig(layers=layers, **general)


def test_without_patterns_all_layers_get_the_general_settings():
    general = SPDConfig(rule_options={"k": 1.0}, weight_decay=3.0, max_pull=1.0, anchor="zero")
    layers = resolve_layers(FQNS, general)
    assert list(layers) == list(FQNS)
    wanted = LayerOptions(
        rule="spd",
        rule_options={"k": 1.0},
        weight_decay=3.0,
        max_pull=1.0,
        anchor=AnchorConfig(source="zero"),
    )
    assert all(options == wanted for options in layers.values())


def test_first_match_wins_and_the_rest_is_inherited():
    layers = resolve_layers(
        FQNS,
        config(
            LayerConfig(pattern=r"head\.bias", weight_decay=0.0),
            LayerConfig(pattern=r"head\..*", rule="decay", weight_decay=0.01),
            LayerConfig(pattern=".*lora_.*", anchor="zero", max_pull=0.5),
            weight_decay=2.0,
            anchor="/models/vit",
        ),
    )
    assert (layers["head.bias"].rule, layers["head.bias"].weight_decay) == ("spd", 0.0)
    assert (layers["head.weight"].rule, layers["head.weight"].weight_decay) == ("decay", 0.01)
    assert layers["encoder.0.lora_A.weight"].anchor.source == "zero"
    assert layers["encoder.0.lora_A.weight"].max_pull == 0.5
    assert layers["encoder.0.weight"].anchor.source == "/models/vit"
    assert layers["encoder.0.weight"].max_pull is None


def test_options_follow_their_rule():
    layers = resolve_layers(
        FQNS,
        config(
            LayerConfig(pattern="head.weight", rule="decay"),
            LayerConfig(pattern="head.bias", rule="spd"),
            LayerConfig(pattern="encoder.0.bias", rule_options={"k": 9}),
            rule_options={"k": 1},
        ),
    )
    assert layers["head.weight"].rule_options == {}
    assert layers["head.bias"].rule_options == {"k": 1}
    assert layers["encoder.0.bias"].rule_options == {"k": 9}


def test_pattern_has_to_match_the_whole_name():
    with pytest.raises(ConfigError, match=r"layers\[0\]\.pattern: 'head' matches no layer") as error:
        resolve_layers(FQNS, config(LayerConfig(pattern="head", rule="decay")))
    assert "5 layers: encoder.0.weight, " in str(error.value)
    assert "closest: head" in str(error.value)


def test_pattern_without_match_names_the_closest():
    with pytest.raises(ConfigError, match=r"closest: head\.weight"):
        resolve_layers(FQNS, config(LayerConfig(pattern=r"haed\.weight", rule="decay")))


def test_long_lists_are_cut():
    fqns = [f"layers.{i}.weight" for i in range(100)]
    with pytest.raises(ConfigError, match=r"100 layers: layers\.0\.weight, .*\(92 more\)"):
        resolve_layers(fqns, config(LayerConfig(pattern="nothing")))


def test_pattern_that_earlier_ones_leave_nothing_to_raises():
    shadowed = config(LayerConfig(pattern=r"head\..*"), LayerConfig(pattern=r"head\.bias", weight_decay=0.0))
    with pytest.raises(
        ConfigError, match=r"layers\[1\]\.pattern: 'head\\\\.bias' has no effect.*first match wins"
    ):
        resolve_layers(FQNS, shadowed)


def test_no_layers_and_no_patterns_is_nothing():
    assert resolve_layers([], SPDConfig()) == {}
    with pytest.raises(ConfigError, match="got 0 layers"):
        resolve_layers([], config(LayerConfig(pattern=".*")))
