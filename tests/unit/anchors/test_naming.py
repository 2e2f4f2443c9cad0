"""Names in the model, in the file and in the loader's mapping; zero that is never silent; grown tables."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sharded_spd import AdamSPD, attach, load_config
from sharded_spd.anchors import FileAnchor
from sharded_spd.errors import AnchorError, BindingError, ConfigError
from sharded_spd.projection.projector import Projector

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def pulled(model: nn.Module, **spd: Any) -> tuple[Projector, list[str]]:
    """One step of full pulls (l2sp, lr * lambda = 1), a small gradient; the projector and the warnings."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.5)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        projector = attach(optimizer, model, load_config({"rule": "l2sp", "weight_decay": 2.0, **spd}))
        for param in params:
            param.grad = torch.full_like(param, 0.1)
        optimizer.step()
    return projector, [str(w.message) for w in seen]


def store(folder: Path, tensors: Mapping[str, Tensor], config: dict[str, Any] | None = None) -> str:
    save_file({name: t.detach().clone() for name, t in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def assert_at(got: Tensor, want: Tensor) -> None:
    # A full pull lands on the anchor up to the rounding of w + (w0 - w).
    torch.testing.assert_close(got.detach(), want, rtol=0, atol=1e-6)


class Tied(nn.Module):
    def __init__(self, rows: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, 4)
        self.lm_head = nn.Linear(4, rows, bias=False)
        self.lm_head.weight = self.embed.weight


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.body(x)))
        return out


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.question, self.answer = Net(), Net()


# --- names ---


@pytest.mark.parametrize("name", ["embed.weight", "lm_head.weight"])
def test_a_tied_layer_is_found_under_either_name(tmp_path: Path, name: str) -> None:
    model = Tied()
    want = torch.randn(6, 4)
    projector, _ = pulled(model, anchor=store(tmp_path, {name: want}))
    assert_at(model.embed.weight, want)
    assert projector.anchor_names() == {"embed.weight": name}


def test_a_rule_may_name_a_tied_layer_by_its_other_name(tmp_path: Path) -> None:
    model, want = Tied(), torch.randn(6, 4)
    pulled(model, anchor=store(tmp_path, {"output": want}), names={r"lm_head\.weight": "output"})
    assert_at(model.embed.weight, want)


@pytest.mark.parametrize("general", [True, False])
def test_two_towers_from_one_file(tmp_path: Path, general: bool) -> None:
    """Refused without a rule, in a sentence that has one."""
    base = Net().state_dict()
    folder, rules = store(tmp_path, base), {r"(?:question|answer)\.(.*)": r"\1"}
    with pytest.raises(AnchorError, match=r'more than one way .* names: \{"answer.*\(\.\*\)": "\\\\1"\}'):
        pulled(Two(), anchor=folder)
    model = Two()
    spd = {"anchor": folder, "names": rules} if general else {"anchor": {"source": folder, "names": rules}}
    pulled(model, **spd)
    for tower in (model.question, model.answer):
        for name, param in tower.named_parameters():
            assert_at(param, base[name])


def test_a_rule_by_a_store_for_adam_spd(tmp_path: Path) -> None:
    base = {f"teacher.{n}": t for n, t in Net().state_dict().items()}
    other = {f"student.{n}": t for n, t in Net().state_dict().items()}
    anchor = FileAnchor(store(tmp_path, {**base, **other}), names={"(.*)": r"teacher.\1"})
    optimizer = AdamSPD(Net().named_parameters(), anchor=anchor, weight_decay=1.0)
    assert optimizer.projector.anchor_names()["head.bias"] == "teacher.head.bias"


def test_a_rule_that_matches_no_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AnchorError, match=r"'heads\.\*' matches no layer"):
        pulled(Net(), anchor=store(tmp_path, Net().state_dict()), names={r"heads.*": "x"})


def test_two_rules_to_one_tensor_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = store(tmp_path, Net().state_dict())
    rules = {r"body\.0\.weight": "head.weight"}
    with pytest.raises(
        AnchorError, match=r"body\.0\.weight: has shape \[4, 4\].*\(head\.weight\) it has \[2, 4\]"
    ):
        pulled(Net(), anchor=folder, names=rules)


@pytest.mark.parametrize("rules", [["a"], {"(": "x"}, {"a": r"\1"}, {"a": 3}, {3: "a"}, {"": "x"}])
def test_rules_are_checked(rules: Any) -> None:
    with pytest.raises(ConfigError, match=r"^anchor\.names(\.\w+)?: "):
        load_config({"anchor": {"source": "folder", "names": rules}})


@pytest.mark.parametrize("spd", [{"names": {"a": "b"}}, {"anchor": {"source": "zero", "names": {"a": "b"}}}])
def test_rules_without_a_file_are_refused(spd: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="names: say what layers are called in a file"):
        load_config(spd)


def test_a_model_that_peft_wraps_twice_or_within_another(tmp_path: Path) -> None:
    base, config = Net().state_dict(), peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["head"])

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = peft.get_peft_model(Net(), config)

    model = Around()
    lora = [{"pattern": ".*lora_.*", "anchor": "zero"}]
    projector, _ = pulled(
        model, anchor=store(tmp_path, {f"net.{n}": t for n, t in base.items()}), layers=lora
    )
    assert set(projector.anchor_names().values()) == {"net.head.weight", "net.head.bias"}


# --- the loader's renamings ---


def bert(cls: str = "BertForPreTraining") -> Any:
    sizes = dict(
        vocab_size=12, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    return getattr(transformers, cls)(transformers.BertConfig(**sizes, max_position_embeddings=8))


@pytest.mark.parametrize("known", [True, False], ids=["model", "names only"])
@pytest.mark.parametrize("missing", ["raise", "zero"])
def test_gamma_and_beta_of_an_old_checkpoint(tmp_path: Path, known: bool, missing: str) -> None:
    base = {
        n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t + 0.5
        for n, t in bert().state_dict().items()
        if "cls." not in n
    }
    model = bert("BertModel")
    anchor = FileAnchor(store(tmp_path, base), missing=missing)  # type: ignore[arg-type]
    give = {"model": model} if known else {}
    names = [(n, p) for n, p in model.named_parameters() if "pooler" not in n or missing == "raise"]
    optimizer = AdamSPD(names, anchor=anchor, weight_decay=1.0, **give)
    got = optimizer.projector.anchor_names()
    assert got["embeddings.LayerNorm.weight"] == "bert.embeddings.LayerNorm.gamma"
    assert None not in got.values()


def test_a_tower_that_was_cut_from_a_larger_one_that_its_loader_renames(tmp_path: Path) -> None:
    sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, image_size=4, patch_size=2)
    whole = transformers.ViTModel(
        transformers.ViTConfig(num_hidden_layers=3, **sizes), add_pooling_layer=False
    )
    whole.save_pretrained(tmp_path)
    logging.disable(logging.WARNING)
    try:
        cut = transformers.ViTModel.from_pretrained(tmp_path, num_hidden_layers=1, add_pooling_layer=False)
    finally:
        logging.disable(logging.NOTSET)
    before = {n: p.detach().clone() for n, p in cut.named_parameters()}
    _, said = pulled(cut, anchor=str(tmp_path))
    for name, param in cut.named_parameters():
        assert_at(param, before[name])
    assert any("leaves out" in text for text in said)


@pytest.mark.parametrize("old_file", [True, False])
def test_weight_norm_before_and_now(tmp_path: Path, old_file: bool) -> None:
    def conv(old: bool) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
            return nn.Sequential(make(nn.Conv1d(4, 4, 3), dim=2))

    base, model = conv(old_file), conv(not old_file)
    pulled(model, anchor=store(tmp_path, base.state_dict()), anchor_missing="zero")
    for got, want in zip(
        sorted(map(_sum, model.parameters())), sorted(map(_sum, base.parameters())), strict=True
    ):
        assert got == pytest.approx(want, abs=1e-5)


def _sum(tensor: Tensor) -> float:
    return float(tensor.detach().sum())


@pytest.mark.parametrize("missing", ["raise", "zero"])
def test_a_part_of_a_parametrization_is_no_missing_layer(tmp_path: Path, missing: str) -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    folder = store(tmp_path, nn.Sequential(nn.Linear(4, 4)).state_dict())
    with pytest.raises(AnchorError, match=r"original0: missing .* holds whole; anchor it at its start"):
        pulled(model, anchor=folder, anchor_missing=missing)


# --- layers beyond the model ---


def test_extra_prediction_layers_are_left_out_by_the_configuration(tmp_path: Path) -> None:
    class Stack(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(depth))

    base = Stack(3).state_dict()
    _, said = pulled(Stack(2), anchor=store(tmp_path, base, {"num_hidden_layers": 2}))
    assert any("leaves out" in text and "layers.2.weight" in text for text in said)
    with pytest.raises(AnchorError, match="larger model's"):
        pulled(Stack(2), anchor=store(tmp_path, base, {"num_hidden_layers": 3}))


# --- zero ---


def test_zero_for_missing_layers_is_said_with_their_names(tmp_path: Path) -> None:
    base = {n: t for n, t in Net().state_dict().items() if "head" not in n}
    _, said = pulled(Net(), anchor=store(tmp_path, base), anchor_missing="zero")
    assert any(
        "lacks 2 layer(s), anchored at zero" in text and "head.weight, head.bias" in text for text in said
    )


def test_zero_never_takes_a_gain(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(AnchorError, match=r"1\.weight: missing .* and 1 throughout"):
        pulled(model, anchor=store(tmp_path, model[0].state_dict(prefix="0.")), anchor_missing="zero")


def test_zero_never_takes_a_layer_whose_values_are_in_the_file(tmp_path: Path) -> None:
    model = Net()
    base = {n.replace("head", "scorer"): t for n, t in model.state_dict().items()}
    with pytest.raises(
        AnchorError, match=r"head\.weight: has the values of scorer\.weight .* another name: names: "
    ):
        pulled(model, anchor=store(tmp_path, base), anchor_missing="zero")


ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=["0", "1"]),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=["0", "1"], use_dora=True),
    "pissa": lambda: peft.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights="pissa"),
    "olora": lambda: peft.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights="olora"),
    "ia3": lambda: peft.IA3Config(target_modules=["0", "1"], feedforward_modules=["1"]),
    "vera": lambda: peft.VeraConfig(r=2, target_modules=["0", "1"]),
    "adalora": lambda: peft.AdaLoraConfig(init_r=2, target_modules=["0", "1"], total_step=10),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["0", "1"]),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=["0", "1"]),
    "boft": lambda: peft.BOFTConfig(boft_block_size=2, target_modules=["0", "1"]),
    "hra": lambda: peft.HRAConfig(r=2, target_modules=["0", "1"]),
}


@pytest.mark.parametrize("how", ["zero", "missing"])
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_at_rest_is_the_pre_trained_model(tmp_path: Path, kind: str, how: str) -> None:
    torch.manual_seed(0)
    base, x = Net(), torch.randn(5, 4)
    with torch.no_grad():
        want = base(x)
    folder = store(tmp_path, base.state_dict())
    model = peft.get_peft_model(base, ADAPTERS[kind]()).eval()
    if how == "missing":  # of a file that holds none of the layers it is refused
        model.base_model.model.head.requires_grad_(True)
        _, said = pulled(model, anchor=folder, anchor_missing="zero")
    else:
        _, said = pulled(model, anchor="zero")
    # PiSSA takes the base weight apart and together again in float32.
    torch.testing.assert_close(model(x), want, rtol=0, atol=2e-5)
    kept = kind in ("dora", "pissa", "olora", "ia3", "boft", "hra")
    assert any("instead of zero" in text for text in said) == kept


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group")
def test_a_trained_lora_stays_anchored_at_zero(tmp_path: Path) -> None:
    """Its factors are not zero when it is loaded; the model tells that its base is the pre-trained one."""
    model = peft.get_peft_model(Net(), ADAPTERS["lora"]())
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param)
    pulled(model, anchor="zero")
    assert all(bool((p == 0).all()) for n, p in model.named_parameters() if "lora_" in n)
    lora = [
        (n.replace("default.", ""), p.detach().add(1.0).requires_grad_())
        for n, p in model.named_parameters()
        if "lora_" in n
    ]
    with pytest.warns(UserWarning, match="2 pair"):
        AdamSPD(lora, anchor="zero", weight_decay=1.0)


# --- tables of another size ---


@pytest.mark.parametrize("name", ["embed.weight", "lm_head.weight"])
@pytest.mark.parametrize("device", ["auto", "disk"])
@pytest.mark.parametrize("rows", [4, 8])
def test_the_rows_that_file_and_model_share_are_anchored(
    tmp_path: Path, rows: int, device: str, name: str
) -> None:
    model, stored = Tied(rows), torch.randn(6, 4)
    start = model.embed.weight.detach().clone()
    anchor = {"source": store(tmp_path, {name: stored}), "device": device}
    _, said = pulled(model, anchor=anchor)
    shared = min(rows, 6)
    assert_at(model.embed.weight[:shared], stored[:shared])
    assert_at(model.embed.weight[shared:], start[shared:])
    assert any(f"embed.weight has {rows} rows, the file 6" in text for text in said)


def test_a_head_of_other_classes_is_no_grown_table(tmp_path: Path) -> None:
    base = {**Net().state_dict(), "head.weight": torch.randn(7, 4), "head.bias": torch.randn(7)}
    with pytest.raises(AnchorError, match=r"head\.weight: has shape \[2, 4\]"):
        pulled(Net(), anchor=store(tmp_path, base))


def test_a_transposed_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AnchorError, match="has shape"):
        pulled(Tied(), anchor=store(tmp_path, {"embed.weight": torch.randn(4, 6)}))


def test_a_resized_vocabulary_of_transformers(tmp_path: Path) -> None:
    model = bert("BertForMaskedLM")
    model.save_pretrained(tmp_path)
    base = load_file(tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(16)
    key = "bert.embeddings.word_embeddings.weight"
    pulled(model, anchor=str(tmp_path))
    assert_at(model.get_input_embeddings().weight[:12], base[key])


# --- another dtype after binding ---


@pytest.mark.parametrize("attached", [True, False])
def test_a_dtype_that_changes_while_training_is_refused_in_a_sentence(attached: bool) -> None:
    model = Net()
    if attached:
        optimizer: Any = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
        attach(optimizer, model)
    else:
        optimizer = AdamSPD(model.named_parameters(), weight_decay=1.0)
    for change in (lambda: None, model.bfloat16):
        change()
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        if change == model.bfloat16:
            with pytest.raises(
                BindingError, match=r"'body\.0\.weight' was torch\.float32 .* torch\.bfloat16 now.*bind\("
            ):
                optimizer.step()
        else:
            optimizer.step()


def test_a_wider_dtype_before_the_first_step_holds_the_anchor() -> None:
    model = Net()
    optimizer = AdamSPD(model.named_parameters(), weight_decay=1.0)
    model.double()
    for _ in range(3):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert optimizer.projector.num_steps == 3
