"""Rows of files as tokens: packing, what is learned, streams, and what is wrong with a file."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sharded_spd.config.loading import build
from sharded_spd.errors import ConfigError
from sharded_spd.finetune.data.examples import global_batches, share_of_batch
from sharded_spd.finetune.data.rows import read_rows
from sharded_spd.finetune.data.text_sources import (
    LabelledFiles,
    LanguageFiles,
    labelled_splits,
    language_splits,
)
from sharded_spd.finetune.metrics import IGNORED, Outcome
from sharded_spd.finetune.world import World
from tests.job.models import save_llama, sentences, write_lines

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("text") / "llama")


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(llama)


def language(file: Path, tokenizer: Any, **settings: Any) -> Any:
    options = build(
        LanguageFiles, {"train": str(file), "test": str(file), "max_length": 64, **settings}, "data"
    )
    return language_splits(options, tokenizer, limit=None)


def total_loss(model: Any, data: Any) -> tuple[float, float]:
    batch = dict(data.take(torch.arange(len(data))))
    labels = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORED)
    with torch.no_grad():
        outcome = Outcome(model(**batch, use_cache=False).logits, labels)
    return float(outcome.losses.sum()), float(outcome.counts.sum())


def test_packed_documents_do_not_see_each_other(llama: Path, tokenizer: Any, tmp_path: Path) -> None:
    """The same losses as one by one, in fewer examples; the training set is cut, the test set is not."""
    file = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in sentences(12, seed=5)])
    model = AutoModelForCausalLM.from_pretrained(llama)
    packed = language(file, tokenizer, packing=True).test
    alone = language(file, tokenizer, packing=False).test
    assert len(packed) < len(alone) == 12
    (loss, count), (expected, wanted) = total_loss(model, packed), total_loss(model, alone)
    assert count == wanted == packed.units(torch.arange(len(packed)))
    assert loss == pytest.approx(expected, rel=1e-5)
    train = language(file, tokenizer, packing=True).train
    assert {len(train.piece(index).tokens) for index in range(len(train) - 1)} == {64}


def learned(data: Any, tokenizer: Any, index: int = 0) -> str:
    labels = data.take(torch.tensor([index]))["labels"][0]
    return tokenizer.decode(labels[labels != IGNORED])


def test_only_completions_and_answers_are_learned(tokenizer: Any, tmp_path: Path) -> None:
    pairs = write_lines(tmp_path / "p.jsonl", [{"prompt": "the cat sees", "completion": " a red dog"}])
    assert learned(language(pairs, tokenizer).train, tokenizer) == " a red dog</s>"
    everything = learned(language(pairs, tokenizer, completion_only=False).train, tokenizer)
    assert everything.endswith("at sees a red dog</s>") or everything.endswith("cat sees a red dog</s>")
    talk = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sees a dog"},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": "a tree"},
    ]
    chat = write_lines(tmp_path / "c.jsonl", [{"messages": talk}])
    assert learned(language(chat, tokenizer).train, tokenizer) == "sees a dog</s>a tree</s>\n"


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "txt", "jsonl", "folder"])
def test_formats_hold_the_same_rows(suffix: str, tokenizer: Any, tmp_path: Path) -> None:
    texts = ["the cat, sees", "a red dog", "NA"]
    file = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": texts}), file)
    elif suffix in ("jsonl", "folder"):
        file = tmp_path / "a.jsonl"
        write_lines(file, [{"text": text} for text in texts])
        file = tmp_path if suffix == "folder" else file
    elif suffix == "txt":
        file.write_text("\n".join(texts) + "\n")
    else:
        mark = "\t" if suffix == "tsv" else ","
        file.write_text(f"text{mark}other\n" + "".join(f'"{text}"{mark}1\n' for text in texts))
    found = language(file, tokenizer, packing=False, text_by="line").train
    ids = [found.piece(index).tokens.ids.tolist() for index in range(len(found))]
    assert ids == [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]


def test_a_stream_is_the_same_for_every_rank_and_after_a_resume(tokenizer: Any, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "s.jsonl", [{"text": text} for text in sentences(30, seed=1)])
    stream = language(file, tokenizer, streaming=True, shuffle_buffer=8).train

    def batches(skip: int) -> list[torch.Tensor]:
        found = global_batches(stream, steps=6, batch_size=4, seed=3, world=ALONE, skip=skip)
        return [batch.take(torch.arange(batch.count))["input_ids"] for batch in found]

    first, again = batches(0), batches(4)
    assert all(torch.equal(a, b) for a, b in zip(first[4:], again, strict=True))
    other = next(iter(global_batches(stream, steps=1, batch_size=4, seed=4, world=ALONE, skip=0)))
    assert not torch.equal(first[0], other.take(torch.arange(4))["input_ids"])
    once = language(file, tokenizer, streaming=True, packing=False, shuffle_buffer=8).train
    seen = next(iter(global_batches(once, steps=1, batch_size=30, seed=0, world=ALONE, skip=0)))
    assert len({tuple(piece.tokens.ids) for piece in seen.examples}) == 30  # each document once per pass


def test_a_stream_whose_completions_are_all_cut_off_ends(tokenizer: Any, tmp_path: Path) -> None:
    long, good = {"prompt": "the cat " * 80, "completion": "sees"}, {"prompt": "a", "completion": " dog"}
    file, test = write_lines(tmp_path / "l.jsonl", [long]), write_lines(tmp_path / "t.jsonl", [good])
    settings = {"streaming": True, "packing": False, "max_length": 16, "test": str(test)}
    stream = language(file, tokenizer, **settings).train
    with pytest.raises(ConfigError, match="no document has anything to learn within 16 tokens"):
        next(stream.examples(0))


def test_a_step_is_the_mean_over_its_tokens(tokenizer: Any, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "u.jsonl", [{"text": text} for text in sentences(9, seed=2)])
    data = language(file, tokenizer, packing=False).train
    weights = share_of_batch(9, ALONE, units=data.units(torch.arange(9)), parts=2)
    assert float(weights[0][1][0]) == pytest.approx(1 / total_tokens(data))


def total_tokens(data: Any) -> int:
    return sum(len(data.piece(index).tokens) - 1 for index in range(len(data)))


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.jsonl", b"", "a.jsonl is empty"),
        (
            "a.jsonl",
            b'{"text": "x y"}\n\n{"txt": 1}\n',
            "a.jsonl, line 3: none of the columns 'text'",
        ),
        ("a.jsonl", b'{"txt": "x"}\n', "a.jsonl, line 1: none of the columns 'text', 'prompt'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2: is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "a.jsonl, line 2: is a JSON list; wanted an object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl, line 2: is not text in UTF-8"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl, line 1: column 'text' has 3 (int); wanted str"),
        ("a.jsonl", b'{"prompt": "x"}\n', "a.jsonl, line 1: no column 'completion', only: prompt"),
        ("a.jsonl", b'{"messages": [{"content": "x"}]}\n', "a.jsonl, line 1: wanted a list of messages"),
        ("a.csv", b"text,b\nx y,1\n\xff\xfe,2\n", "a.csv, line 3: is not text in UTF-8"),
        ("a.csv", b"text\n", "holds nothing to learn"),
        ("a.csv", b'text,b\n"x\ny",1\na,b,c\n', "a.csv, line 4: has 3 fields, but the header 2"),
        ("a.csv", b'text\nx\n"y\nz\n', "a.csv, line 3: a quote is not closed"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "\\ud800"}\n',
            "line 2: holds half of a surrogate pair",
        ),
        (
            "a.jsonl",
            b'{"text": "x", "text": "y"}\n',
            "line 1: is not JSON: the key 'text' stands twice",
        ),
        (
            "a.jsonl",
            b'{"text": ' + b"[" * 3000 + b"]" * 3000 + b"}\n",
            "line 1: is nested too deeply",
        ),
        ("a.jsonl", b'{"text": "x y"}\n{"text": null}\n', "a.jsonl, line 2: column 'text' has no value"),
        ("a.json", b'{"text": "x"}\n{"text": }', "a.json, line 2: is not JSON: Expecting value"),
        ("a.json", b'[{"text": "x"},\n{"text": }]', "a.json, line 2: is not JSON: Expecting value"),
        ("a.txt", b"\n \n", "holds nothing to learn"),
        ("a.parquet", b"PAR1 not really", "a.parquet cannot be read as parquet"),
        ("a.xml", b"<x/>", "a.xml is of an unknown or another format"),
        (None, b"", "there is no"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_wrong_is_said_with_file_and_line(
    name: str | None, content: bytes, wanted: str, streaming: bool, tokenizer: Any, tmp_path: Path
) -> None:
    file = tmp_path / (name or "none.jsonl")
    if name is not None:
        file.write_bytes(content)
    good = write_lines(tmp_path / "good.jsonl", [{"text": "the cat sees a dog"}])

    def read() -> None:
        data = language(file, tokenizer, test=str(good), streaming=streaming).train
        next(iter(global_batches(data, steps=1, batch_size=8, seed=0, world=ALONE, skip=0)))

    with pytest.raises(ConfigError) as raised:
        read()
    assert wanted in str(raised.value)
    assert str(raised.value).startswith("data.train: ")
    assert str(file) in str(raised.value)


def test_texts_stay_as_they_are_where_other_columns_change_their_type(tmp_path: Path) -> None:
    """In a file of several megabytes, which a library may read part by part."""
    texts = [f'{n} the "cat"' * 10 for n in range(100_000)]
    rows: list[dict[str, object]] = [{"text": text} for text in texts]
    rows[90_000]["more"], rows[95_000]["more"] = 1, {"a": "b"}
    file = write_lines(tmp_path / "a.jsonl", rows)
    assert file.stat().st_size > 11 << 20
    found = list(read_rows([file], key="k", streaming=False, by="line"))
    assert [row.values["text"] for row in found] == texts
    assert found[-1].where == f"{file}, line 100000"


def test_reading_asks_no_server(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no network each such question takes seconds."""
    asked: list[Any] = []

    def refuse(*place: Any, **_: Any) -> Any:
        asked.append(place)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    file = write_lines(tmp_path / "a.jsonl", [{"text": "the cat sees a dog"}])
    assert len(language(file, tokenizer).test) == 1
    assert not asked


def test_labels_that_training_has_not_seen(tokenizer: Any, tmp_path: Path) -> None:
    train = write_lines(tmp_path / "a.jsonl", [{"text": "the cat", "label": n} for n in ("yes", "no")])
    rows = [{"text": "a dog", "label": "yes"}, {"text": "a dog", "label": "maybe"}]
    test = write_lines(tmp_path / "b.jsonl", rows)
    options = build(LabelledFiles, {"train": str(train), "test": str(test)}, "data")
    with pytest.raises(ConfigError) as raised:
        labelled_splits(options, tokenizer, {"no": 0, "yes": 1}.get, limit=None)
    assert f"data.test: {test}, line 2: the label 'maybe' is none of the model's classes" in str(raised.value)


def test_unknown_settings_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.max_lenght: unknown key; did you mean 'max_length'"):
        build(LanguageFiles, {"train": "a", "test": "b", "max_lenght": 3}, "data")
