"""The standard library as a language model's data, and a Llama-shaped model of 100 M parameters to train.

    python docs/examples/stdlib.py FOLDER

writes `docs-train.jsonl` and `docs-test.jsonl` (docstrings, a document per module), `code-train.jsonl` and
`code-test.jsonl` (the modules without their docstrings), and `model/`: a tokenizer learned on both, and
random weights. No module stands in a training and a test file. docs/finetune.md says what to do with them.
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
}
TEST_SHARE = 10
"""One module in so many is for the test."""

TEST_CHARACTERS = 40_000
"""Of each test set: a processor takes its time for 100 M parameters."""


def modules() -> Iterator[tuple[str, str]]:
    """Name and source of every module, always in the same order."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if not LEFT_OUT & {*parts}:
            yield (
                ".".join(parts).removesuffix(".__init__"),
                path.read_text(encoding="utf-8", errors="replace"),
            )


def split(name: str, source: str) -> tuple[str, str]:
    """The docstrings of a module under the names of what they describe, and the source without them."""
    lines, docs = source.splitlines(), []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = ast.get_docstring(node)
        if text:
            title = f"module {name}" if isinstance(node, ast.Module) else node.name
            docs.append(f"{title}\n\n{text}\n")
            literal = node.body[0]
            for at in range(literal.lineno - 1, literal.end_lineno or literal.lineno):
                lines[at] = ""
    return "\n".join(docs), "\n".join(line for line in lines if line.strip())


def write_data(folder: Path) -> list[Path]:
    """Write all four files; those for training come first."""
    files = {(kind, part): [] for part in ("train", "test") for kind in ("docs", "code")}
    sizes = dict.fromkeys(files, 0)
    for name, source in modules():
        part = "test" if zlib.crc32(name.encode()) % TEST_SHARE == 0 else "train"
        for kind, text in zip(("docs", "code"), split(name, source), strict=True):
            key = (kind, part)
            if len(text) < 200 or (part == "test" and sizes[key] + len(text) > TEST_CHARACTERS):
                continue
            sizes[key] += len(text)
            files[key].append(json.dumps({"text": text}) + "\n")
    written = []
    for (kind, part), rows in files.items():
        written.append(folder / f"{kind}-{part}.jsonl")
        written[-1].write_text("".join(rows), encoding="utf-8")
        print(f"{written[-1]}: {len(rows)} modules, {sizes[kind, part]:,} characters")
    return written


def write_model(folder: Path, texts: list[Path]) -> None:
    """Learn a tokenizer, and draw the weights."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=16384,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = (json.loads(line)["text"] for path in texts for line in path.read_text().splitlines())
    raw.train_from_iterator(lines, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters")


def main() -> None:
    """Write data and model into the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model", write_data(folder)[:2])


if __name__ == "__main__":
    main()
