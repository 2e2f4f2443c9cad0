"""The user's files of text as the sets of a job: for language models, and for classifiers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from sharded_spd.config.loading import wrong
from sharded_spd.errors import ConfigError
from sharded_spd.finetune.data.encode import Encoder, TextColumns, Tokens
from sharded_spd.finetune.data.examples import Batch, ExampleSet, Splits, TrainSet
from sharded_spd.finetune.data.rows import By, find_files, read_rows, value_of
from sharded_spd.finetune.data.tokens import PackedExample, TokenSet, TokenStream, documents, packed


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Files of rows: a path, a folder or a pattern each. `limit`: of `train`, only the first so many rows."""

    train: str
    test: str
    validation: str | None = None
    ood: Mapping[str, str] = field(default_factory=dict)
    max_length: int = 1024
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise wrong("max_length", "2 tokens or more", self.max_length)
        if self.limit is not None and self.limit < 1:
            raise wrong("limit", "1 or more", self.limit)

    @property
    def tests(self) -> dict[str, str]:
        """The paths of all sets but the training one, by key."""
        found = {"test": self.test, **{f"ood.{name}": path for name, path in self.ood.items()}}
        return found if self.validation is None else {"validation": self.validation, **found}

    def splits(self, train: TrainSet, tests: Mapping[str, ExampleSet]) -> Splits:
        """The sets together, those but the training one by key."""
        ood = {name: tests[f"ood.{name}"] for name in self.ood}
        return Splits(train=train, test=tests["test"], ood=ood, validation=tests.get("validation"))


@dataclass(frozen=True, kw_only=True)
class LanguageFiles(TextFiles):
    """For a language model: texts, prompts with completions, or conversations.

    `packing`: several documents per example, without attention between them. `completion_only`: only
    completions and the assistant's turns are targets. `streaming`: read `train` while training, shuffled
    within `shuffle_buffer` documents. `text_by`: what one document of a plain text file is.
    """

    packing: bool = True
    completion_only: bool = True
    streaming: bool = False
    shuffle_buffer: int = 1000
    text_by: By = "document"
    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shuffle_buffer < 1:
            raise wrong("shuffle_buffer", "1 document or more", self.shuffle_buffer)


@dataclass(frozen=True, kw_only=True)
class LabelledFiles(TextFiles):
    """For a classifier: columns of one text, or of two that belong together, and one of labels."""

    text: tuple[str, ...] = ("text",)
    label: str = "label"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= len(self.text) <= 2:
            raise wrong("text", "one column, or two", self.text)

    def labels(self) -> set[str | int]:
        """Those of the training set."""
        rows = labelled_rows(self, self.train, key="data.train", limit=self.limit)
        return {label for _, label, _ in rows}


def language_splits(options: LanguageFiles, tokenizer: Any, *, limit: int | None) -> Splits:
    """Tokenised sets; `limit`: the longest text that the model takes.

    Raises:
        ConfigError: what cannot be read, with file and line; a set with nothing to learn.
    """
    if limit is not None and options.max_length > limit:
        raise wrong("data.max_length", f"at most the model's {limit} tokens", options.max_length)
    columns = TextColumns(options.text, options.prompt, options.completion, options.messages)
    encoder = Encoder(tokenizer, columns, completion_only=options.completion_only)
    cut = partial(packed if options.packing else documents, length=options.max_length)
    # A score should not depend on where examples are cut.
    cut_test = partial(cut, whole=True) if options.packing else cut
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0

    def found(path: str, key: str, *, streaming: bool = False, rows: int | None = None) -> Iterator[Tokens]:
        learned = False
        files = find_files(path, key=key)
        for count, row in enumerate(
            read_rows(files, key=key, streaming=streaming, by=options.text_by), start=1
        ):
            tokens = encoder.encode(row, key=key)
            learned = learned or bool(tokens.targets.any())
            yield tokens
            if count == rows:
                break
        if not learned:
            raise ConfigError(f"{key}: {path} holds nothing to learn: no row has a token that is predicted")

    def read(
        path: str, key: str, cut: Callable[..., Iterator[PackedExample]], rows: int | None = None
    ) -> TokenSet:
        pieces = TokenSet(cut(found(path, key, rows=rows)), pad=pad, by_position=options.packing)
        if not len(pieces):
            raise ConfigError(f"{key}: no row of {path} has a completion within {options.max_length} tokens")
        return pieces

    train: TrainSet
    if options.streaming:
        every = partial(found, options.train, "data.train", streaming=True, rows=options.limit)
        next(every())  # what is wrong with the first row is found now
        train = TokenStream(every, cut, options.max_length, options.shuffle_buffer, pad, options.packing)
    else:
        train = read(options.train, "data.train", cut, options.limit)
    tests = {key: read(path, f"data.{key}", cut_test) for key, path in options.tests.items()}
    return options.splits(train, tests)


class LabelledTexts:
    """Tokenised texts and their classes."""

    lazy = False

    def __init__(self, encoded: list[Mapping[str, Any]], labels: list[int], *, pad: int) -> None:
        self.labels = torch.tensor(labels)
        self._rows = [{name: np.array(values, np.int32) for name, values in row.items()} for row in encoded]
        self._pad = pad

    def __len__(self) -> int:
        return len(self._rows)

    def units(self, indices: torch.Tensor) -> float:
        """One for each."""
        return float(len(indices))

    def take(self, indices: torch.Tensor) -> Batch:
        """Those at `indices`, filled up to the longest."""
        rows = [self._rows[index] for index in indices.tolist()]
        width = max(len(row["input_ids"]) for row in rows)
        batch: dict[str, torch.Tensor] = {"labels": self.labels[indices]}
        for name in rows[0]:
            fill = self._pad if name == "input_ids" else 0
            batch[name] = torch.full((len(rows), width), fill, dtype=torch.int64)
            for at, row in enumerate(rows):
                batch[name][at, : len(row[name])] = torch.from_numpy(row[name].astype(np.int64))
        return batch


Labelled = Iterator[tuple[tuple[str, ...], str | int, str]]


def labelled_rows(options: LabelledFiles, path: str, *, key: str, limit: int | None = None) -> Labelled:
    """The texts, the label and the place of each row.

    Raises:
        ConfigError: a missing column or value, with file and line; no rows.
    """
    count = 0
    for row in read_rows(find_files(path, key=key), key=key, streaming=False, by="line"):
        texts = tuple(str(value_of(row, column, key=key, kind=str)) for column in options.text)
        label = value_of(row, options.label, key=key, kind=(str, int))
        yield texts, label, row.where
        count += 1
        if count == limit:
            break
    if not count:
        raise ConfigError(f"{key}: {path} holds no rows")


def labelled_splits(
    options: LabelledFiles, tokenizer: Any, classes: Callable[[str | int], int | None], *, limit: int | None
) -> Splits:
    """Tokenised sets; `classes` gives a label's number, None for one that was not seen in training.

    Raises:
        ConfigError: what cannot be read, or a label that is not known, with file and line.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    length = options.max_length if limit is None else min(options.max_length, limit)

    def read(path: str, key: str, rows: int | None = None) -> LabelledTexts:
        encoded: list[Mapping[str, Any]] = []
        labels: list[int] = []
        for texts, label, where in labelled_rows(options, path, key=key, limit=rows):
            number = classes(label)
            if number is None:
                raise ConfigError(f"{key}: {where}: the label {label!r} is none of the model's classes")
            encoded.append(dict(tokenizer(*texts, truncation=True, max_length=length)))
            labels.append(number)
        return LabelledTexts(encoded, labels, pad=pad)

    tests = {key: read(path, f"data.{key}") for key, path in options.tests.items()}
    return options.splits(read(options.train, "data.train", options.limit), tests)


LANGUAGE_SOURCES: Mapping[str, tuple[type[Any], Callable[..., Splits]]] = {
    "files": (LanguageFiles, language_splits)
}
"""What a language model can be trained on, by the name in the block `data`."""
