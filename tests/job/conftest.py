"""A tiny checkpoint and a job on it, for all tests of the command."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import ViTConfig, ViTForImageClassification


def save_tiny_model(directory: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=10,
    )
    ViTForImageClassification(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("job")


@pytest.fixture(scope="session")
def checkpoint(home: Path) -> Path:
    return save_tiny_model(home / "checkpoint")


@pytest.fixture(scope="session")
def tiny_job(home: Path, checkpoint: Path) -> Path:
    """Two steps of 25 digits, which two ranks cannot share evenly."""
    job = {
        "checkpoint": str(checkpoint),
        "data": {"name": "digits", "pool": 60, "train": 50, "validation": 40, "pretrain": 1500},
        "device": "cpu",
        "compare": ["adamw", "spd"],
        "train": {"epochs": 1, "batch_size": 25, "lr": 1e-2, "evaluations": 1, "max_grad_norm": 1.0},
        "spd": {"weight_decay": 2.0},
    }
    path = home / "tiny.yaml"
    path.write_text(yaml.safe_dump(job))
    return path
