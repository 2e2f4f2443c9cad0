"""Causal language modelling: texts, completions or conversations; scored by perplexity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sharded_spd.finetune.data.examples import Batch, Splits
from sharded_spd.finetune.data.sources import pick
from sharded_spd.finetune.data.text_sources import LANGUAGE_SOURCES
from sharded_spd.finetune.metrics import IGNORED, Outcome
from sharded_spd.finetune.tasks.loading import read_config, read_tokenizer
from sharded_spd.finetune.tasks.models import ModelTask

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")


class CausalLM(ModelTask):
    """A Hugging Face language model and texts, all of whose tokens, or whose completions, are learned."""

    auto = "AutoModelForCausalLM"
    peft_kind = "CAUSAL_LM"
    metrics: Sequence[str] = ("perplexity", "loss", "accuracy")

    _tokenizer: Any = None

    def model_config(self, directory: Path) -> Any:
        """The checkpoint's own; its tokenizer is read too."""
        if self._tokenizer is None:
            self._tokenizer = read_tokenizer(directory, trust=self._config.trust_remote_code)
        return read_config(directory, trust=self._config.trust_remote_code)

    def splits(self, model_config: Any, *, seed: int) -> Splits:
        """The sets, the same for every seed."""
        limit = next((getattr(model_config, name) for name in _LENGTHS if hasattr(model_config, name)), None)
        options, load = pick(LANGUAGE_SOURCES, self._config.data)
        return load(options, self._tokenizer, limit=limit)

    def losses(
        self, model: nn.Module, batch: Batch, *, augment: Callable[..., Any] | None = None
    ) -> torch.Tensor:
        """The cross-entropy of each example, added over its targets."""
        return self.outcome(model, batch).losses

    def outcome(self, model: nn.Module, batch: Batch) -> Outcome:
        """What the model makes of each next token."""
        inputs = {name: tensor.to(self._device) for name, tensor in batch.items()}
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits
        # Nothing follows the last token; every row keeps its length, so that no copy of the logits is made.
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return Outcome(logits, following)

    def add_files(self, folder: Path) -> None:
        """The tokenizer."""
        self._tokenizer.save_pretrained(str(folder))
