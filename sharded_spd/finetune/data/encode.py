"""A row of text as token ids, and which of them are targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from sharded_spd.errors import ConfigError
from sharded_spd.finetune.data.rows import Row, value_of

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Tokens:
    """Token ids `[n]`, and the mask of those that are predicted, `[n]`."""

    ids: Ids
    targets: Mask

    def __post_init__(self) -> None:
        if len(self.targets):
            self.targets[0] = False  # nothing stands before it

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, start: int, stop: int) -> Tokens:
        """A part, whose first token is not predicted."""
        return Tokens(self.ids[start:stop], self.targets[start:stop].copy())


@dataclass(frozen=True)
class TextColumns:
    """The columns of a row: a text, a prompt with its completion, or the messages of a conversation."""

    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"


class Encoder:
    """Makes tokens of rows with a Hugging Face tokenizer; each document ends with its end-of-text token."""

    def __init__(self, tokenizer: Any, columns: TextColumns, *, completion_only: bool) -> None:
        self._tokenizer, self._columns, self._only = tokenizer, columns, completion_only
        self._end: int | None = tokenizer.eos_token_id

    def encode(self, row: Row, *, key: str) -> Tokens:
        """The tokens of a row; it has a column of messages, of prompts, or of texts.

        Raises:
            ConfigError: it has none of them, or a value of another kind; with file and line.
        """
        columns = self._columns
        if row.values.get(columns.messages) is not None:
            return self._conversation(row, key)
        if row.values.get(columns.prompt) is not None:
            prompt = value_of(row, columns.prompt, key=key, kind=str)
            completion = value_of(row, columns.completion, key=key, kind=str)
            return self._completed(prompt, completion)
        if columns.text not in row.values:
            raise ConfigError(
                f"{key}: {row.where}: none of the columns {columns.text!r}, {columns.prompt!r} (with "
                f"{columns.completion!r}) and {columns.messages!r}, only: {', '.join(map(str, row.values))}"
            )
        ids = self._tokenizer(value_of(row, columns.text, key=key, kind=str)).input_ids
        return self._ended(ids, [True] * len(ids))

    def _ended(self, ids: Sequence[int], targets: Sequence[bool]) -> Tokens:
        ids, targets = list(ids), list(targets)
        if self._end is not None and (not ids or ids[-1] != self._end):
            ids.append(self._end)
            targets.append(True)
        return Tokens(np.array(ids, np.int32), np.array(targets, np.bool_))

    def _completed(self, prompt: str, completion: str) -> Tokens:
        ids, targets = self._spans(prompt + completion, [(len(prompt), len(prompt) + len(completion))])
        return self._ended(ids, targets if self._only else [True] * len(ids))

    def _spans(
        self, text: str, spans: Sequence[tuple[int, int]], *, special: bool = True
    ) -> tuple[list[int], list[bool]]:
        """The ids of a text, and which of them end inside of one of the spans of characters."""
        if self._tokenizer.is_fast:
            found = self._tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
            ends = [stop if stop > start else -1 for start, stop in found["offset_mapping"]]
            return found["input_ids"], [any(a < end <= b for a, b in spans) for end in ends]
        ids: list[int] = []
        targets: list[bool] = []
        edges = sorted({0, len(text), *(edge for span in spans for edge in span)})
        for start, stop in pairwise(edges):
            part = self._tokenizer(text[start:stop], add_special_tokens=False).input_ids
            ids += part
            targets += [any(a <= start and stop <= b for a, b in spans)] * len(part)
        return ids, targets

    def _conversation(self, row: Row, key: str) -> Tokens:
        messages = value_of(row, self._columns.messages, key=key, kind=list)
        if not messages or not all(isinstance(m, Mapping) and m.get("role") for m in messages):
            raise ConfigError(f"{key}: {row.where}: wanted a list of messages, each with role and content")
        messages = [{k: v for k, v in m.items() if v is not None} for m in messages]
        try:
            whole = self._tokenizer.apply_chat_template(messages, tokenize=False)
            spans = list(self._answers(messages, whole)) if self._only else [(0, len(whole))]
        except ConfigError as error:
            raise ConfigError(f"{key}: {row.where}: {error}") from None
        except Exception as error:  # a template may raise anything
            raise ConfigError(f"{key}: {row.where}: the chat template does not take it: {error}") from None
        ids, targets = self._spans(whole, spans, special=False)
        return Tokens(np.array(ids, np.int32), np.array(targets, np.bool_))

    def _answers(self, messages: Sequence[Mapping[str, Any]], whole: str) -> Iterator[tuple[int, int]]:
        """Where in the conversation's text the assistant speaks, its closing mark included."""
        for at, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            render = self._tokenizer.apply_chat_template
            before = render(messages[:at], tokenize=False, add_generation_prompt=True) if at else ""
            until = render(messages[: at + 1], tokenize=False)
            if not (whole.startswith(until) and until.startswith(before)):
                raise ConfigError(
                    "the chat template writes a turn otherwise once others follow, so that the answers "
                    "cannot be told apart; set data.completion_only: false, or use another template"
                )
            yield len(before), len(until.rstrip("\n")) if at + 1 < len(messages) else len(until)
