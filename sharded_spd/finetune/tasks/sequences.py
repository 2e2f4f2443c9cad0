"""Classification of texts, or of pairs of texts; scored by accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sharded_spd.finetune.data.docstring_source import DocstringOptions, docstring_splits
from sharded_spd.finetune.data.examples import Batch, Splits
from sharded_spd.finetune.data.matching import is_pools, match, mean_pooled
from sharded_spd.finetune.data.sources import pick
from sharded_spd.finetune.data.text_sources import LabelledFiles, labelled_splits
from sharded_spd.finetune.metrics import Outcome
from sharded_spd.finetune.tasks.loading import read_config, read_tokenizer
from sharded_spd.finetune.tasks.models import ModelTask

LABELLED_SOURCES: Mapping[str, tuple[type[Any], Callable[..., Splits]]] = {
    "files": (LabelledFiles, labelled_splits),
    "stdlib-docstrings": (DocstringOptions, docstring_splits),
}
"""What a classifier of texts can be trained on, by the name in the block `data`; options have `labels`."""


class SequenceClassification(ModelTask):
    """A Hugging Face text classifier; its classes are those named, its own, or the training set's."""

    auto = "AutoModelForSequenceClassification"
    peft_kind = "SEQ_CLS"
    head = ("classifier", "score", "classification_head")
    metrics: Sequence[str] = ("accuracy", "f1", "loss")

    _tokenizer: Any = None
    _numbers: Mapping[str, int] | None = None

    def model_config(self, directory: Path) -> Any:
        """The checkpoint's own, with other classes if its are not those of the training set."""
        trust = self._config.trust_remote_code
        config = read_config(directory, trust=trust)
        if self._tokenizer is None:
            self._tokenizer = read_tokenizer(directory, trust=trust)
            if self._tokenizer.pad_token_id is None and self._tokenizer.eos_token is not None:
                self._tokenizer.pad_token = self._tokenizer.eos_token
        if self._numbers is None:
            own = {str(name): int(number) for name, number in config.label2id.items()}
            classes = self._config.classes or self._seen(own)
            self.new_head = bool(classes)
            self._numbers = {name: number for number, name in enumerate(classes)} if classes else own
        if self.new_head:
            config = read_config(
                directory,
                trust=trust,
                id2label={number: name for name, number in self._numbers.items()},
                label2id=dict(self._numbers),
            )
        config.pad_token_id = self._tokenizer.pad_token_id
        return config

    def _seen(self, own: Mapping[str, int]) -> tuple[str, ...]:
        """The training set's labels, in order; none if the checkpoint knows them all."""
        options, _ = pick(LABELLED_SOURCES, self._config.data)
        found = options.labels()
        if all(str(label) in own for label in found):
            return ()
        if all(isinstance(label, int) for label in found) and _count_from_zero(found, len(own)):
            return ()
        return tuple(str(label) for label in sorted(found, key=lambda x: (isinstance(x, str), x)))

    def _number(self, label: str | int) -> int | None:
        numbers = self._numbers or {}
        if str(label) in numbers:
            return numbers[str(label)]
        return label if isinstance(label, int) and not self.new_head and 0 <= label < len(numbers) else None

    def splits(self, model_config: Any, *, seed: int) -> Splits:
        """The sets, the same for every seed."""
        options, load = pick(LABELLED_SOURCES, self._config.data)
        limit = getattr(model_config, "max_position_embeddings", None)
        return load(options, self._tokenizer, self._number, limit=limit)

    def losses(
        self, model: nn.Module, batch: Batch, *, augment: Callable[..., Any] | None = None
    ) -> torch.Tensor:
        """The cross-entropy of each text."""
        return self.outcome(model, batch).losses

    def outcome(self, model: nn.Module, batch: Batch) -> Outcome:
        """What the model makes of each text; of pools of pairs: which text its encoder finds the nearest."""
        inputs = {name: tensor.to(self._device) for name, tensor in batch.items()}
        if is_pools(batch):
            return match(inputs, lambda side: _pooled(model, side))
        labels = inputs.pop("labels")
        return Outcome(model(**inputs).logits.float(), labels)

    def add_files(self, folder: Path) -> None:
        """The tokenizer."""
        self._tokenizer.save_pretrained(str(folder))


def _pooled(model: nn.Module, inputs: Batch) -> torch.Tensor:
    """Sentence vectors as sentence-transformers makes them of a mean-pooling encoder, without the head."""
    hidden: torch.Tensor = model(**inputs, output_hidden_states=True).hidden_states[-1]
    return mean_pooled(hidden, inputs["attention_mask"])


def _count_from_zero(found: set[str | int], classes: int) -> bool:
    return all(0 <= int(label) < classes for label in found)
