"""What is fine-tuned on what: a recipe, and settings on top of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "configs" / "recipes"
OWN = Path(__file__).parent


@dataclass(frozen=True)
class Setting:
    """One line of the benchmark's questions.

    Args:
        title: for the table.
        recipe: the job's YAML file.
        overrides: settings on top of it, for every method.
        head_lr: LP-FT's learning rate of the head.
        slack: how much worse than the best a candidate may be on the validation set, as a share; None: one
            standard error of a share of its examples.
        text_model: whether data and pre-trained model are made by `language.py`.
        probe: whether LP-FT is one of the methods: not where the model has no head of its own, and not where
            the recipe trains the head first for all methods.
    """

    title: str
    recipe: Path
    overrides: tuple[str, ...] = ()
    head_lr: float = 1e-2
    slack: float | None = None
    text_model: bool = False
    probe: bool = True


_ALONE = ("engine=single", "ranks=1", "device=cpu", "save=none", "select={}", "seeds=[0]")

SETTINGS = {
    "digits": Setting(
        "digits, seven corruptions", RECIPES / "quickstart.yaml", (*_ALONE, "train.evaluations=1")
    ),
    "classes": Setting(
        "digits 0 to 6, then 7 to 9",
        RECIPES / "quickstart.yaml",
        (
            *_ALONE,
            "train.evaluations=1",
            "train.epochs=10",
            "data.classes=[0, 1, 2, 3, 4, 5, 6]",
            "data.train=150",
        ),
    ),
    "docstrings": Setting(
        "packages by their docstrings", RECIPES / "minilm.yaml", (*_ALONE, "train.evaluations=1"), probe=False
    ),
    "code": Setting(
        "documentation, then code",
        OWN / "code.yaml",
        _ALONE,
        slack=0.005,
        text_model=True,
        probe=False,
    ),
}


def smoke(setting: Setting) -> Setting:
    """The same, much too short to say anything."""
    few: tuple[str, ...] = ("train.epochs=2",)
    if setting.text_model:
        few = ("train.max_steps=4", "data.limit=40")
    if setting.recipe.name == "quickstart.yaml":
        few = (*few, "pretrain.train.epochs=30", "pretrain.min_accuracy=0")
    if setting.recipe.name == "minilm.yaml":
        sizes = (f"data.{part}=100" for part in ("train", "validation", "test"))
        few = ("train.max_steps=2", "head_first.max_steps=2", *sizes, "data.pool=20")
    return replace(setting, overrides=(*setting.overrides, *few))
