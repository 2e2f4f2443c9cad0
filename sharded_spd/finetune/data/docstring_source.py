"""The standard library's docstrings as the sets of a job: which package does a function belong to?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sharded_spd.config.loading import wrong
from sharded_spd.errors import ConfigError
from sharded_spd.finetune.data.docstrings import Function, read_functions, shuffled
from sharded_spd.finetune.data.examples import Splits
from sharded_spd.finetune.data.matching import TextPools
from sharded_spd.finetune.data.text_sources import LabelledTexts
from sharded_spd.finetune.data.typing_errors import add_typing_errors

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
"""Those of every Python from 3.10 on that document a hundred functions or more."""


@dataclass(frozen=True, kw_only=True)
class DocstringOptions:
    """How `split_seed` assigns the functions of `packages`, each to one set; the rest is unused.

    `min_words`: shorter docstrings say too little. `typing_errors`: the share of words with one, by
    `typing_seed`. `pool`: the number of names among which a docstring has to find its own; 0: off.
    """

    packages: tuple[str, ...] = PACKAGES
    train: int = 480
    validation: int = 240
    test: int = 480
    split_seed: int = 0
    min_words: int = 4
    max_length: int = 64
    typing_errors: float = 0.3
    typing_seed: int = 7
    pool: int = 100

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test", "min_words"):
            if getattr(self, name) < 1:
                raise wrong(name, "1 or more", getattr(self, name))
        if len(set(self.packages)) < max(2, len(self.packages)):
            raise wrong("packages", "two or more, none twice", self.packages)
        if self.max_length < 3:
            raise wrong("max_length", "3 tokens or more", self.max_length)
        if not 0 < self.typing_errors <= 1:
            raise wrong("typing_errors", "a share in (0, 1]", self.typing_errors)
        if self.pool < 0 or self.pool == 1:
            raise wrong("pool", "2 names or more, or 0", self.pool)

    def labels(self) -> set[str | int]:
        """The packages."""
        return set(self.packages)


@dataclass(frozen=True)
class Dealt:
    """The functions of each set."""

    train: Sequence[Function]
    validation: Sequence[Function]
    test: Sequence[Function]


def deal(options: DocstringOptions) -> Dealt:
    """Read the functions and split them; the same on every machine with the same Python.

    Raises:
        ConfigError: there are fewer than wanted.
    """
    every = shuffled(read_functions(options.packages, min_words=options.min_words), seed=options.split_seed)
    wanted = options.test + options.validation + options.train
    if wanted > len(every):
        raise ConfigError(
            f"data: train + validation + test are {wanted}, but these packages have {len(every)} documented "
            "functions that can be told apart; take fewer, or name more packages"
        )
    test, rest = every[: options.test], every[options.test : wanted]
    return Dealt(rest[options.validation :], rest[: options.validation], test)


def shifted(options: DocstringOptions, functions: Sequence[Function]) -> dict[str, list[str]]:
    """The out-of-distribution texts by name, one for each of the same functions, in their order."""
    mistype = partial(add_typing_errors, share=options.typing_errors, seed=options.typing_seed)
    return {
        "typing errors": [mistype(f.docstring) for f in functions],
        "first sentence": [f.first_sentence for f in functions],
        "code": [f.code for f in functions],
    }


def pairs(functions: Sequence[Function]) -> list[tuple[str, str]]:
    """The docstring and the name, as words, of the functions whose name no earlier one has."""
    found: dict[str, str] = {}
    for function in functions:
        found.setdefault(function.words, function.docstring)
    return [(docstring, words) for words, docstring in found.items()]


def docstring_splits(
    options: DocstringOptions,
    tokenizer: Any,
    classes: Callable[[str | int], int | None],
    *,
    limit: int | None,
) -> Splits:
    """Tokenised sets; `classes` gives a package's number.

    Raises:
        ConfigError: too few functions, or a package that is none of the model's classes.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    length = options.max_length if limit is None else min(options.max_length, limit)
    dealt = deal(options)
    # Batches of texts of one length need little padding.
    by_length = sorted(dealt.test, key=lambda function: len(function.docstring))

    def number(function: Function) -> int:
        found = classes(function.package)
        if found is None:
            raise ConfigError(f"data.packages: {function.package} is none of the model's classes")
        return found

    def encoded(functions: Sequence[Function], texts: Sequence[str]) -> LabelledTexts:
        rows: list[Mapping[str, Any]] = [
            dict(tokenizer(text, truncation=True, max_length=length)) for text in texts
        ]
        return LabelledTexts(rows, [number(function) for function in functions], pad=pad)

    def docstrings(functions: Sequence[Function]) -> LabelledTexts:
        return encoded(functions, [function.docstring for function in functions])

    kept = {}
    if options.pool:
        kept = {"name": TextPools(pairs(dealt.test), tokenizer, size=options.pool, length=length)}
    return Splits(
        train=docstrings(dealt.train),
        validation=docstrings(dealt.validation),
        test=docstrings(by_length),
        ood={name: encoded(by_length, texts) for name, texts in shifted(options, by_length).items()},
        retained=kept,
    )
