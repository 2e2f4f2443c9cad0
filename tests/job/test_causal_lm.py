"""A language model under every engine: the same losses, and checkpoints that load elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from sharded_spd.cli import app as command
from tests.job.commands import ROOT, environment, metrics, results
from tests.job.conftest import save_tiny_model
from tests.job.models import save_llama, write_texts
from tests.support.warm import python

QUICK = ("fsdp2", "zero2", "zero3")
SLOW = ("ddp", "fsdp1", "zero1")
LORA = "lora={r: 4, target_modules: [q_proj, v_proj], modules_to_save: [lm_head]}"
SHORT = "train.max_steps=3"
FREE = ("train.max_steps=2", "train.max_grad_norm=null")
REFERENCES = {"plain": [], "lora": [LORA, SHORT]}
"""Jobs of one process."""
ENGINES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
LORA_ENGINES = ["zero3", pytest.param("fsdp2", marks=pytest.mark.slow)]

SCORE = """
import json, math, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
texts = [json.loads(line)["text"] for line in open(sys.argv[1])]
for directory in sys.argv[2:]:
    model, tokenizer = (kind.from_pretrained(directory) for kind in (AutoModelForCausalLM, AutoTokenizer))
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids + [tokenizer.eos_token_id]])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    print(math.exp(total / count))
"""


def engine_setting(name: str) -> str:
    if not name.startswith("zero"):
        return f"engine={name}"
    return f"engine={{name: deepspeed, config: {ROOT / 'configs' / 'deepspeed' / f'{name}.json'}}}"


@pytest.fixture(scope="module")
def lm_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("lm")
    save_llama(home / "llama")
    write_texts(home / "train.jsonl", 120, seed=1)
    write_texts(home / "test.jsonl", 21, seed=2)
    write_texts(home / "ood.jsonl", 10, seed=3)
    (home / "bad.jsonl").write_text('{"text": "fine"}\n\n{"text": "not clo\n')
    job = {
        "task": "causal-lm",
        "checkpoint": str(home / "llama"),
        "data": {
            "train": str(home / "train.jsonl"),
            "test": str(home / "test.jsonl"),
            "ood": {"others": str(home / "ood.jsonl")},
            "max_length": 40,
        },
        "device": "cpu",
        "metrics": ["perplexity", "accuracy"],
        # Nine examples in two parts, which two ranks cannot share evenly.
        "train": {
            "epochs": 10,
            "max_steps": 20,
            "batch_size": 9,
            "gradient_accumulation": 2,
            "lr": 1e-2,
            "schedule": "cosine",
            "warmup": 0.1,
            "max_grad_norm": 1.0,
            "evaluate_every": 10,
        },
        "spd": {"weight_decay": 1.0},
    }
    (home / "job.yaml").write_text(yaml.safe_dump(job))
    return home


def in_this_process(job: Path, *settings: str) -> None:
    before = sys.argv
    sys.argv = ["sharded-spd", "finetune", str(job), *settings]
    try:
        with pytest.raises(SystemExit) as exit_:
            command.main()
        assert exit_.value.code == 0
    finally:
        sys.argv = before


def on_two_ranks(home: Path, cases: dict[str, list[str]], name: str) -> Path:
    """Every case in one launch."""
    out = home / name
    job = str(home / "job.yaml")
    whole = {case: given if given[0].endswith(".yaml") else [job, *given] for case, given in cases.items()}
    arguments = [str(out), json.dumps(whole)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(ROOT / "tests" / "job" / "every_engine.py"), *arguments],
        cwd=home,
        env={**environment(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def recipe_cases(home: Path) -> dict[str, list[str]]:
    """The recipes of the repository, cut down to two steps of tiny models."""
    cases = {}
    for recipe in sorted((ROOT / "configs" / "recipes").glob("llama-*.yaml")):
        data = [f"data.{part}={home / part}.jsonl" for part in ("train", "test")]
        short = ["data.max_length=40", "train.batch_size=8", "train.max_steps=2", "eval_batch_size=8"]
        cases[recipe.stem] = [str(recipe), f"checkpoint={home / 'llama'}", *data, *short, "device=cpu"]
    photos = save_photos(home / "photos")
    sets = [f"data.{part}={photos}" for part in ("train", "test", "validation", "ood.drawings")]
    short = ["train.batch_size=8", "train.max_steps=2", "classes=[bright, dark]", "device=cpu"]
    checkpoint = f"checkpoint={save_tiny_model(home / 'vit')}"
    cases["vision-fsdp2"] = [
        str(ROOT / "configs" / "recipes" / "vision-fsdp2.yaml"),
        checkpoint,
        *sets,
        *short,
    ]
    return cases


def save_photos(folder: Path) -> Path:
    for index in range(12):
        name = ("dark", "bright")[index % 2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        picture = np.full((9, 9), 40 + 150 * (index % 2) + index, np.uint8)
        Image.fromarray(picture).save(folder / name / f"{index}.png")
    return folder


FEW = ("train.max_steps=6", "train.epochs=10")
RECIPES = sorted(path.stem for path in (ROOT / "configs" / "recipes").glob("*-*.yaml"))


@pytest.fixture(scope="module")
def alone(lm_home: Path) -> Path:
    """Jobs of one process."""
    for name, settings in REFERENCES.items():
        in_this_process(lm_home / "job.yaml", *settings, f"output_dir={lm_home / 'alone' / name}")
    return lm_home / "alone"


@pytest.fixture(scope="module")
def quick(lm_home: Path) -> Path:
    cases = {name: [engine_setting(name)] for name in QUICK}
    cases["lora-zero3"] = [engine_setting("zero3"), LORA, SHORT]
    cases |= recipe_cases(lm_home)
    cases["bad"] = [engine_setting("fsdp2"), f"data.train={lm_home / 'bad.jsonl'}"]
    return on_two_ranks(lm_home, cases, "quick")


@pytest.fixture(scope="module")
def slow(lm_home: Path) -> Path:
    cases = {name: [engine_setting(name)] for name in SLOW}
    cases["lora-fsdp2"] = [engine_setting("fsdp2"), LORA, SHORT]
    for name in (*QUICK, *SLOW):
        cases[f"free-{name}"] = [engine_setting(name), *FREE]
        if name.startswith("zero"):
            cases[f"free-{name}"].append("engine.settings={gradient_clipping: auto}")
    cases["free-zero0"] = [*cases["free-zero1"], "engine.settings.zero_optimization={stage: 0}"]
    for load in ("whole", "sharded"):
        cases[f"{load}-fsdp2"] = [engine_setting("fsdp2"), f"load={load}", SHORT]
    cases["few"] = [engine_setting("ddp"), *FEW]
    for name in ("ddp", "fsdp2"):
        cases[f"compiled-{name}"] = [engine_setting(name), "train.compile=true", *FEW]
        cases[f"again-{name}"] = [engine_setting(name), "train.activation_checkpointing=true", *FEW]
        cases[f"half-{name}"] = [engine_setting(name), "train.precision=bfloat16", *FEW]
    return on_two_ranks(lm_home, cases, "slow")


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """The directory of a run on two ranks, by the name of its case."""

    def find(name: str) -> Path:
        group = "quick" if name in (*QUICK, *RECIPES, "lora-zero3") else "slow"
        return Path(request.getfixturevalue(group)) / name

    return find


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run, "step")]


def norms(run: Path) -> list[float]:
    """Of the gradients, before clipping."""
    return [line["grad_norm"] for line in metrics(run, "step")]


@pytest.mark.slow
@pytest.mark.parametrize("engine", [*QUICK, *SLOW, "zero0"])
def test_same_norms_without_clipping(engine: str, alone: Path, run: Callable[[str], Path]) -> None:
    """The first step's, which clipping does not change."""
    expected = metrics(alone / "plain", "step")[0]["grad_norm"]
    assert norms(run(f"free-{engine}"))[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_same_losses_on_every_engine(engine: str, alone: Path, run: Callable[[str], Path]) -> None:
    expected = losses(alone / "plain")
    assert len(expected) == 20
    assert expected[-1] < 0.6 * expected[0]
    # The order of float32 sums differs between engines; a wrong mean over tokens is off by over 1e-2.
    assert losses(run(engine)) == pytest.approx(expected, abs=1e-4)
    assert norms(run(engine)) == pytest.approx(norms(alone / "plain"), rel=1e-3)
    mine, theirs = (results(path)["trainings"][0]["history"] for path in (run(engine), alone / "plain"))
    assert [entry["step"] for entry in mine] == [0, 10, 20]
    for entry, other in zip(mine, theirs, strict=True):
        assert entry["metrics"].keys() == {"test", "others"}
        for name, values in entry["metrics"].items():
            assert values == pytest.approx(other["metrics"][name], rel=1e-3)


@pytest.mark.parametrize("engine", LORA_ENGINES)
def test_same_losses_with_lora(engine: str, alone: Path, run: Callable[[str], Path]) -> None:
    """The added weights and the head that is trained in full start alike, read whole or shard by shard."""
    assert losses(run(f"lora-{engine}")) == pytest.approx(losses(alone / "lora"), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("way", "near"), [("compiled", 1e-4), ("again", 1e-6), ("half", 5e-2)])
def test_other_ways_to_the_same_losses(
    engine: str, way: str, near: float, run: Callable[[str], Path]
) -> None:
    """Compiled, with activations formed again in the backward pass, and in half precision."""
    expected, found = losses(run("few")), losses(run(f"{way}-{engine}"))
    assert found == pytest.approx(expected, abs=near)
    if way == "half":
        assert found != pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_reading_shards_is_reading_the_model(run: Callable[[str], Path]) -> None:
    """From the same bits come the same bits."""
    assert losses(run("sharded-fsdp2")) == losses(run("whole-fsdp2"))


@pytest.mark.parametrize(
    "names",
    [("fsdp2", "zero3", "lora-zero3"), pytest.param((*SLOW, "lora-fsdp2"), marks=pytest.mark.slow)],
)
def test_checkpoints_load_elsewhere_and_reach_what_was_reported(
    names: tuple[str, ...], run: Callable[[str], Path], lm_home: Path
) -> None:
    """In a fresh process, by transformers alone: whole models, and adapters on top of their base."""
    trained = [results(run(name))["trainings"][0] for name in names]
    done = subprocess.run(
        [python("job"), "-c", SCORE, str(lm_home / "test.jsonl"), *(t["checkpoint"] for t in trained)],
        env=environment(lm_home),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    reported = [t["history"][-1]["scores"]["test"] for t in trained]
    assert [float(line) for line in done.stdout.split()] == pytest.approx(reported, rel=1e-5)
    assert (Path(trained[-1]["checkpoint"]) / "adapter_config.json").is_file()


def test_a_bad_line_is_one_sentence_on_all_ranks(quick: Path, lm_home: Path) -> None:
    for rank in (0, 1):
        ended = json.loads((quick / f"ended-{rank}.json").read_text())
        assert f"data.train: {lm_home / 'bad.jsonl'}, line 3: is not JSON" in ended.pop("bad")
        assert set(ended.values()) == {"0"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_run(recipe: str, run: Callable[[str], Path]) -> None:
    found = metrics(run(recipe), "step")
    assert [line["step"] for line in found] == [1, 2]
    assert all(line["loss"] > 0 for line in found)
    assert found[0]["activation_rate"] is not None


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_describe_themselves(recipe: str, lm_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run reads the data and the shape of the model, and leaves nothing behind."""
    out = lm_home / "dry"
    job, *settings = recipe_cases(lm_home)[recipe]
    in_this_process(Path(job), *settings, "ranks=2", f"output_dir={out}", "--dry-run")
    text = capsys.readouterr().out
    engine = "deepspeed" if recipe.endswith("zero3") else "fsdp2"
    for part in (f"{engine}, 2 rank(s)", "weights 1/2", "each rank reads its shards only", "2 of 8 examples"):
        assert part in text
    assert ("added weights at zero" in text) == ("lora" in recipe)
    assert "could not be told" not in text
    assert not out.exists()
