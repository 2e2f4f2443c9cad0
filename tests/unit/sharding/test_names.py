"""Names that wrappers change, and finding a layer in a checkpoint."""

from __future__ import annotations

import pytest

from sharded_spd.errors import AnchorError
from sharded_spd.sharding.names import clean_fqn, clean_fqns, match_names

BASE = ("embed.weight", "encoder.0.weight", "encoder.0.bias", "encoder.1.weight")
HEAD = ("classifier.weight", "classifier.bias")


def under(prefix: str, *names: str) -> list[str]:
    return [prefix + name for name in names]


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("encoder.0.weight", "encoder.0.weight"),
        ("_orig_mod.encoder.0.weight", "encoder.0.weight"),
        ("_fsdp_wrapped_module.encoder.0._fsdp_wrapped_module.weight", "encoder.0.weight"),
        ("_fpw_module.encoder._checkpoint_wrapped_module.0.weight", "encoder.0.weight"),
        ("_fsdp_wrapped_module._orig_mod.weight", "weight"),
        ("module.weight", "module.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("weight", "weight"),
        ("", ""),
    ],
)
def test_clean_fqn(name, clean):
    assert clean_fqn(name) == clean
    assert clean_fqn(clean) == clean


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "_fsdp_wrapped_module.",
        "base_model.model.",
        "module.base_model.model.",
        "vit.",
        "module.vit.",
        "base_model.model.vit.",
    ],
)
def test_prefix_on_either_side(prefix):
    wrapped = under(prefix, *BASE)
    assert match_names(wrapped, BASE) == dict(zip(wrapped, BASE, strict=True))
    assert match_names(BASE, wrapped) == dict(zip(BASE, wrapped, strict=True))


def test_wrappers_within():
    wanted = ["encoder.0._checkpoint_wrapped_module.weight", "encoder.1._fsdp_wrapped_module.weight"]
    assert match_names(wanted, BASE) == dict(
        zip(wanted, ["encoder.0.weight", "encoder.1.weight"], strict=True)
    )


def test_peft_layers_and_their_additions():
    wanted = [
        "base_model.model.encoder.0.base_layer.weight",
        "base_model.model.encoder.0.lora_A.default.weight",
        "base_model.model.encoder.0.bias",
        "base_model.model.classifier.original_module.weight",
        "base_model.model.classifier.modules_to_save.default.weight",
    ]
    assert match_names(wanted, [*BASE, *HEAD]) == {
        wanted[0]: "encoder.0.weight",
        wanted[2]: "encoder.0.bias",
        wanted[3]: "classifier.weight",
        wanted[4]: "classifier.weight",
    }


def test_own_submodule_called_module():
    names = ["module.weight", "head.weight"]
    assert match_names(names, names) == dict(zip(names, names, strict=True))
    wrapped = under("module.", *names)
    assert match_names(wrapped, names) == dict(zip(wrapped, names, strict=True))
    assert match_names(names, wrapped) == dict(zip(names, wrapped, strict=True))
    # Not every name begins with `module.`: this is no wrapper, so the layer is missing rather than guessed.
    assert match_names(["module.weight", "weight"], ["weight"]) == {"weight": "weight"}


def test_own_submodule_called_base_layer_or_base_model():
    names = ["block.base_layer.weight", "base_model.model.weight", "block.weight"]
    assert match_names(names, names) == dict(zip(names, names, strict=True))


def test_exact_name_wins_over_a_wrapped_one():
    assert match_names(["weight"], ["module.weight", "_orig_mod.weight", "weight"]) == {"weight": "weight"}


def test_base_model_beside_a_new_head():
    wanted = [*under("vit.", *BASE), *HEAD]
    assert match_names(wanted, BASE) == dict(zip(under("vit.", *BASE), BASE, strict=True))
    saved = [*BASE, *HEAD]
    assert match_names(wanted, saved) == dict(zip(wanted, saved, strict=True))


def test_full_checkpoint_for_a_base_model():
    saved = [*under("vit.", *BASE), *HEAD]
    assert match_names(BASE, saved) == dict(zip(BASE, under("vit.", *BASE), strict=True))


def test_prefix_is_not_used_for_a_leftover():
    # The names as they are explain the model; a head that merely resembles a tensor is missing.
    assert match_names([*BASE, "head.norm.weight"], [*BASE, "norm.weight"]) == dict(
        zip(BASE, BASE, strict=True)
    )
    assert match_names(["vit.norm.weight", "norm.weight"], ["norm.weight"]) == {"norm.weight": "norm.weight"}


def test_prefix_that_is_not_the_same_for_every_name_is_ambiguous():
    with pytest.raises(AnchorError, match=r"more than one way \(with 'student'.*: 4 layers, with 'teacher'"):
        match_names(BASE, [*under("student.", *BASE), *under("teacher.", *BASE)])
    with pytest.raises(
        AnchorError, match=r"more than one way \(without 'decoder': 4 layers, without 'encoder'"
    ):
        match_names([*under("encoder.", *BASE), *under("decoder.", *BASE)], BASE)


def test_several_tensors_for_one_layer():
    with pytest.raises(
        AnchorError, match=r"^a\.weight: could be any of _fpw_module\.a\.weight, _orig_mod\.a\.weight"
    ):
        match_names(["a.weight"], ["_orig_mod.a.weight", "_fpw_module.a.weight"])


def test_one_tensor_for_several_layers():
    with pytest.raises(AnchorError, match=r"^a\.weight, a\.base_layer\.weight: all would be a\.weight"):
        match_names(["a.weight", "a.base_layer.weight"], ["a.weight"])


def test_prefix_that_would_take_a_settled_tensor():
    with pytest.raises(AnchorError, match=r"^a, vit\.a: all would be a of the checkpoint"):
        match_names(["a", "vit.a", "vit.b"], ["a", "b"])


def test_nothing_in_common_and_nothing_at_all():
    assert match_names(BASE, ["x.y", "z"]) == {}
    assert match_names([], BASE) == {}
    assert match_names(BASE, []) == {}


@pytest.mark.parametrize(
    ("names", "want"),
    [
        (["module.a.weight", "module.b"], ["a.weight", "b"]),
        (["module.module.a", "module.module.b"], ["a", "b"]),
        (["module.a", "b"], ["module.a", "b"]),
        (["base_model.model.x", "base_model.model._orig_mod.y"], ["x", "y"]),
        (["_fsdp_wrapped_module.a", "module.a"], ["a", "module.a"]),
        ([], []),
    ],
)
def test_what_all_names_begin_with_is_dropped(names: list[str], want: list[str]) -> None:
    assert clean_fqns(names) == want
