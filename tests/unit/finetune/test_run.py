"""Parts of the job that need no training: splits, batches, choosing, figures, names in checkpoints."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from sharded_spd.anchors import FileAnchor, MappedValues
from sharded_spd.anchors.base import is_on_disk
from sharded_spd.anchors.tools.build import add_manifest
from sharded_spd.config import AnchorConfig, SPDConfig
from sharded_spd.errors import ConfigError
from sharded_spd.finetune.config import FROM_CHECKPOINT, NamedBlock, TrainConfig
from sharded_spd.finetune.data.corruptions import broad_augmentation, seven_corruptions
from sharded_spd.finetune.data.examples import share_of_batch
from sharded_spd.finetune.data.sources import ImageSpec, load_splits
from sharded_spd.finetune.report.records import Figure, new_directory
from sharded_spd.finetune.run.head_first import head_of
from sharded_spd.finetune.run.loop import _schedule, evaluation_steps, total_steps
from sharded_spd.finetune.run.methods import _with_anchor
from sharded_spd.finetune.run.pretrain import cached_checkpoint
from sharded_spd.finetune.run.resume import Progress
from sharded_spd.finetune.run.select import choose_strength
from sharded_spd.finetune.tasks.checkpoint import RenamedAnchor, names_in_checkpoint
from sharded_spd.finetune.world import World
from sharded_spd.sharding.layout import FlatRange, ShardSlice

DIGITS = ImageSpec((8, 8), 1, {str(n): n for n in range(10)})


def test_no_digit_stands_in_two_splits() -> None:
    for seed in (0, 1):
        splits = load_splits(NamedBlock(name="digits"), spec=DIGITS, seed=seed)
        sets = [splits.pretrain, splits.train, splits.validation, splits.test]
        rows = torch.cat([s.images(torch.arange(len(s.labels))).flatten(1) for s in sets if s is not None])
        assert len(rows) == 1797 - 50  # the pool's digits that this seed did not draw
        assert len(rows.unique(dim=0)) == len(rows)  # all 1797 images are distinct


def test_some_of_the_digits() -> None:
    """The others are tested out of distribution only; the pre-training has seen all."""
    options = {"classes": [0, 4, 9], "train": 60}
    splits = load_splits(NamedBlock(name="digits", options=options), spec=DIGITS, seed=0)
    usual = load_splits(NamedBlock(name="digits"), spec=DIGITS, seed=0)
    assert splits.validation is not None
    for some in (splits.train, splits.validation, splits.test):
        assert set(some.labels.tolist()) == {0, 4, 9}
    assert list(splits.ood) == ["other classes"]
    others = splits.ood["other classes"].labels
    assert set(others.tolist()) == {1, 2, 3, 5, 6, 7, 8}
    assert len(others) + len(splits.test.labels) == len(usual.test.labels)
    assert splits.pretrain is not None
    assert usual.pretrain is not None
    assert torch.equal(splits.pretrain.labels, usual.pretrain.labels)
    for wrong in ([0, 10], list(range(10))):
        with pytest.raises(ConfigError, match="some of the digits 0 to 9"):
            load_splits(NamedBlock(name="digits", options={"classes": wrong}), spec=DIGITS, seed=0)
    with pytest.raises(ConfigError, match="200 images cannot be drawn from 26 of"):
        load_splits(NamedBlock(name="digits", options={"classes": [1]}), spec=DIGITS, seed=0)


def test_heads() -> None:
    vision = ViTForImageClassification(ViTConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1))
    assert head_of(vision) == ["classifier.weight", "classifier.bias"]
    small = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    for tied in (True, False):
        config = LlamaConfig(**small, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied)
        if tied:
            with pytest.raises(ConfigError, match="LlamaForCausalLM has no head of its own"):
                head_of(LlamaForCausalLM(config))
        else:
            assert head_of(LlamaForCausalLM(config)) == ["lm_head.weight"]


def test_a_seed_draws_its_own_training_digits_and_no_others() -> None:
    first, again, other = (
        load_splits(NamedBlock(name="digits"), spec=DIGITS, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first.train.labels, again.train.labels)
    assert not torch.equal(first.train.labels, other.train.labels)
    assert torch.equal(first.test.labels, other.test.labels)
    every = torch.arange(len(first.test.labels))
    assert torch.equal(first.ood["noise"].images(every), other.ood["noise"].images(every))


def test_corruptions_do_what_they_are_called() -> None:
    dot = torch.zeros(1, 1, 9, 9)
    dot[0, 0, 4, 7] = 1  # right of the centre
    changed = {name: change(dot) for name, change in seven_corruptions(seed=0).items()}
    rows = torch.arange(9.0).view(9, 1)
    assert float((changed["rotation left"][0, 0] * rows).sum() / changed["rotation left"].sum()) < 3.5  # up
    assert float((changed["rotation right"][0, 0] * rows).sum() / changed["rotation right"].sum()) > 4.5
    assert int(changed["shift"].argmax()) == 5 * 9 + 8
    assert float(changed["inversion"].max()) == 1.0
    assert int(changed["inversion"].argmin()) == 4 * 9 + 7
    assert changed["blur"].sum() == pytest.approx(1.0, abs=0.2)
    assert float(changed["blur"].max()) < 0.5
    assert float(changed["contrast"].max()) == pytest.approx(0.65)
    assert float((changed["noise"] - dot).std()) == pytest.approx(0.3, rel=0.3)


def test_augmentation_follows_its_generator() -> None:
    images = torch.rand(64, 1, 8, 8)
    first, again = (broad_augmentation(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert ((first - images).flatten(1).norm(dim=1) > 1e-3).float().mean() > 0.8


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("batch", "ranks"), [(25, 2), (1, 2), (8, 4), (3, 4), (7, 1)])
def test_ranks_share_a_batch_and_weigh_it_as_one(batch: int, ranks: int, parts: int) -> None:
    worlds = [World(rank=rank, size=ranks, device=torch.device("cpu")) for rank in range(ranks)]
    shares = [share_of_batch(batch, world, parts=parts) for world in worlds]
    assert {len(share) for share in shares} == {parts}
    assert len({len(mine) for share in shares for mine, _ in share}) == 1
    counted = torch.cat([mine[weights > 0] for share in shares for mine, weights in share])
    assert counted.tolist() == list(range(batch))
    # Engines average over ranks: the mean of the ranks' weighted sums is the mean over the batch.
    losses = torch.stack([sum((mine * weights).sum() for mine, weights in share) for share in shares])
    assert float(losses.mean()) == pytest.approx((batch - 1) / 2, rel=1e-6)


def test_steps_and_evaluations() -> None:
    config = TrainConfig(epochs=3, batch_size=32)
    assert total_steps(200, config) == 21
    assert evaluation_steps(21, 3) == {7, 14, 21}
    assert evaluation_steps(2, 5) == {1, 2}
    assert total_steps(200, TrainConfig(epochs=3, batch_size=32, max_steps=5)) == 5
    assert evaluation_steps(21, 3, every=10) == {10, 20, 21}


@pytest.mark.parametrize("warmup", [0.05, 0.25, 0.33])
def test_a_warmup_that_ends_between_two_steps_stays_below_the_learning_rate(warmup: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = _schedule(optimizer, TrainConfig(warmup=warmup), 10)
    seen = []
    for _ in range(10):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == sorted(seen)
    assert seen[-1] == max(seen) == 1.0


def test_largest_strength_within_one_standard_error_of_the_best() -> None:
    scores = {1.0: [96.0, 96.0], 3.0: [97.0, 95.4], 8.0: [95.5, 95.5], 20.0: [93.0, 93.0]}
    # sqrt(0.962 * 0.038 / 400) = 0.96 %: 95.5 is within it of 96.2, 93.0 is not.
    assert choose_strength(scores, examples=400, rule="one-standard-error") == 8.0
    assert choose_strength(scores, examples=400, rule="best") == 3.0
    assert choose_strength(scores, examples=40_000, rule="one-standard-error") == 3.0
    assert choose_strength({1.0: [100.0], 2.0: [100.0]}, examples=10, rule="best") == 2.0


def test_figures() -> None:
    figure = Figure.of([94.0, 96.0, 95.0])
    assert figure.mean == 95.0
    assert figure.error == pytest.approx(1 / math.sqrt(3))
    assert figure.text() == "95.0 ± 0.6"
    assert Figure.of([95.0]).text() == "95.0"
    assert Figure.of([math.nan, math.nan]).text() == "-"


def test_new_directories_are_numbered(tmp_path: Path) -> None:
    made = []
    for _ in range(3):
        made.append(new_directory(str(tmp_path / "a" / "run")).name)
        (tmp_path / "a" / made[-1] / "file").touch()
    assert made == ["run", "run-2", "run-3"]


def test_stored_names_follow_what_transformers_renames(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, intermediate_size=24, num_hidden_layers=1
    )
    config.num_attention_heads = 2
    ViTForImageClassification(config).save_pretrained(tmp_path)
    model = ViTForImageClassification.from_pretrained(tmp_path)
    names = names_in_checkpoint(model, tmp_path)
    parameters = dict(model.named_parameters())
    assert names.keys() == parameters.keys()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(names.values()) == set(file.keys())
        for fqn, stored in names.items():
            assert torch.equal(file.get_tensor(stored), parameters[fqn])

    store = RenamedAnchor(FileAnchor(tmp_path), names)
    shapes = {fqn: tuple(p.shape) for fqn, p in parameters.items()}
    assert store.problems(shapes) == []
    fqn = "vit.layers.0.attention.q_proj.weight"
    piece = store.fetch(ShardSlice(fqn, 0, 16, FlatRange(32)))
    assert torch.equal(piece, parameters[fqn].flatten()[32:48])
    assert "9, 9" in store.problems({**shapes, fqn: (9, 9)})[0]

    manifest = add_manifest(str(tmp_path))
    store = RenamedAnchor(FileAnchor(tmp_path, dtype="bfloat16"), names)
    assert store.problems(shapes) == []
    assert {name: store.expected(f) for f, name in names.items()} == {
        name: entry.fingerprint for name, entry in manifest.tensors.items()
    }
    assert store.expected_overall() == manifest.fingerprint
    store.fetch(ShardSlice(fqn, 0, parameters[fqn].numel(), FlatRange(0)))
    cast = store.cast(fqn)
    assert cast is not None
    assert cast.fingerprint == store.expected(fqn)
    assert cast.worst > 0


def test_cached_checkpoint_changes_with_its_recipe() -> None:
    from sharded_spd.finetune.config import load_job

    recipe = Path(__file__).resolve().parents[3] / "configs" / "recipes" / "quickstart.yaml"

    def place(*overrides: str, ranks: int = 2) -> Path:
        job = load_job(recipe, ["pretrain.cache_dir=/somewhere", *overrides])
        assert job.pretrain is not None
        return cached_checkpoint(job, job.pretrain, ranks=ranks)

    assert place() == place("train.lr=1e-5", "pretrain.min_accuracy=0.5")
    others = [
        place("pretrain.seed=1"),
        place("pretrain.train.lr=1e-4"),
        place("data.split_seed=3"),
        place(ranks=1),
    ]
    assert len({place(), *others}) == 5


def test_command_without_its_extra_names_it(tmp_path: Path) -> None:
    """A module that shadows typer and is not there stands for an installation of the core alone."""
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('no typer', name='typer')\n")
    code = "from sharded_spd.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "pip install 'sharded_spd[job]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("device", ["auto", "disk"])
def test_anchor_of_the_job_may_stay_on_disk(tmp_path, device):
    """The checkpoint's names are another matter than where its values are kept."""
    save_file({"encoder.weight": torch.arange(6.0)}, tmp_path / "model.safetensors")
    spd = SPDConfig(anchor=AnchorConfig(source=FROM_CHECKPOINT, device=device))
    store = _with_anchor(spd, tmp_path, {"weight": "encoder.weight"}, {}).anchor.source
    assert is_on_disk(store) is (device == "disk")
    values = store.fetch(ShardSlice("weight", 0, 3, FlatRange(2)))
    assert isinstance(values, MappedValues) is (device == "disk")
    assert values[:].tolist() == [2.0, 3.0, 4.0]


def test_damaged_progress_is_refused_by_name(tmp_path: Path) -> None:
    """Silence would repeat days of training, or leave some out."""
    world = World(rank=0, size=1, device=torch.device("cpu"))
    for content in ("{", "[]", '{"results": [{"method": "spd"}]}', '{"validated": 3}'):
        (tmp_path / "progress.json").write_text(content)
        with pytest.raises(ConfigError, match=r"progress\.json is damaged"):
            Progress(tmp_path, world)
    (tmp_path / "progress.json").unlink()
    progress = Progress(tmp_path, world)
    progress.add_validation("spd 1.0 0", 93.5)
    progress.finish()
    again = Progress(tmp_path, world)
    assert again.validated == {"spd 1.0 0": 93.5}
    assert again.finished
    assert [path.name for path in tmp_path.iterdir()] == ["progress.json"]
