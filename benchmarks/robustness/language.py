"""The standard library as text: documentation to pre-train a byte-level Llama on, code to fine-tune it."""

from __future__ import annotations

import ast
import json
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
PARTS = {"train": 200_000, "validation": 12_000, "test": 24_000}
"""Characters of each part at most, of documentation and of code; no module is in two parts."""
DOCUMENT = 2_000
"""Characters of a document: a longer module is several."""


def modules() -> Iterator[tuple[str, str]]:
    """Name and source of every module, in an order that no other machine changes."""
    library = Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in library.rglob("*.py"):
        parts = path.relative_to(library).with_suffix("").parts
        if not LEFT_OUT & {*parts}:
            found[".".join(parts)] = path.read_text(encoding="utf-8", errors="replace")
    for name in sorted(found, key=lambda name: zlib.crc32(name.encode())):
        yield name, found[name]


def split(source: str) -> tuple[str, str]:
    """The docstrings of a module, and its code without them."""
    lines, docs = source.splitlines(), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                docs.append(text)
                literal = node.body[0]
                for at in range(literal.lineno - 1, literal.end_lineno or literal.lineno):
                    lines[at] = ""
    return "\n\n".join(docs), "\n".join(line for line in lines if line.strip())


def write_data(folder: Path) -> None:
    """Write docs-PART.jsonl and code-PART.jsonl."""
    rows: dict[tuple[str, str], list[str]] = {(kind, part): [] for kind in ("docs", "code") for part in PARTS}
    sizes = dict.fromkeys(rows, 0)
    share = {"validation": 0, "test": 1}
    for name, source in modules():
        number = zlib.crc32(name.encode()[::-1]) % 6
        part = next((p for p, n in share.items() if n == number), "train")
        for kind, text in zip(("docs", "code"), split(source), strict=True):
            text = text[: max(0, PARTS[part] - sizes[kind, part])]
            sizes[kind, part] += len(text)
            rows[kind, part] += [text[i : i + DOCUMENT] for i in range(0, len(text), DOCUMENT)]
    folder.mkdir(parents=True, exist_ok=True)
    for (kind, part), texts in rows.items():
        lines = (json.dumps({"text": text}) + "\n" for text in texts if len(text) > 20)
        (folder / f"{kind}-{part}.jsonl").write_text("".join(lines), encoding="utf-8")


def write_model(folder: Path) -> None:
    """A byte-level Llama of about a million parameters with random weights, and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(names),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def pretrain_settings(folder: Path, steps: int) -> list[str]:
    """The job that makes the pre-trained model: the same recipe on documentation, from random weights."""
    return [
        f"checkpoint={folder / 'random'}",
        f"output_dir={folder / 'pretraining'}",
        *(f"data.{part}={folder / f'docs-{part}.jsonl'}" for part in PARTS),
        "data.ood={}",
        "compare=[adamw]",
        "save=all",
        f"train.max_steps={steps}",
        "train.epochs=1000",
        "train.lr=3e-3",
        "train.adamw_weight_decay=0.1",
        "engine=single",
        "ranks=1",
        "device=cpu",
        "seeds=[0]",
    ]
