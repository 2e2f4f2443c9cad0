"""Rows of the user's files, and the place of each in its file.

Parquet, CSV and plain text are read by the `datasets` library. JSON is not: where a type changes within a
file it turns all texts of that part back into JSON, quotation marks included.
"""

from __future__ import annotations

import csv
import glob
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sharded_spd.errors import ConfigError
from sharded_spd.finetune.data.lines import first_fault, json_rows, separator

FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
}
By = Literal["line", "paragraph", "document"]


@dataclass(frozen=True)
class Row:
    """A row's values by column, and its place."""

    values: Mapping[str, Any]
    file: Path
    number: int
    by: str

    @property
    def where(self) -> str:
        """The file, and the line where the format has lines."""
        return f"{self.file}, {_place(self.file, self.number, self.by)}"


def find_files(path: str, *, key: str) -> list[Path]:
    """The files that the setting `key` names: one, all of a folder, or those that a pattern (`*`) matches.

    Raises:
        ConfigError: there are none, they are of an unknown or of several formats, or one is empty.
    """
    given = Path(path)
    if given.is_dir():
        found = sorted(p for p in given.rglob("*") if p.suffix in FORMATS and p.is_file())
        if not found:
            raise ConfigError(f"{key}: {path} holds no {', '.join(FORMATS)} file")
    elif glob.has_magic(path) and not given.exists():
        found = sorted(Path(p) for p in glob.glob(path, recursive=True) if Path(p).is_file())
        if not found:
            raise ConfigError(f"{key}: no file matches {path} (relative paths start at {Path.cwd()})")
    elif given.is_file():
        found = [given]
    else:
        raise ConfigError(f"{key}: there is no {path} (relative paths start at {Path.cwd()})")
    kinds = {FORMATS.get(p.suffix) for p in found}
    if None in kinds or len(kinds) > 1:
        stranger = next((p for p in found if p.suffix not in FORMATS), found[-1])
        raise ConfigError(
            f"{key}: {stranger} is of an unknown or another format; wanted {', '.join(FORMATS)}"
        )
    for file in found:
        if file.stat().st_size == 0:
            raise ConfigError(f"{key}: {file} is empty")
    return found


def read_rows(files: Sequence[Path], *, key: str, streaming: bool, by: By) -> Iterator[Row]:
    """The rows of all files, one after the other; `datasets` keeps its own on disk, or reads as it goes.

    `by`: what a row of plain text is. Rows of nothing but white space are left out.

    Raises:
        ConfigError: a file that cannot be read; with the line, where it can be told.
    """
    for file in files:
        number = -1
        rows = json_rows(file) if FORMATS[file.suffix] == "json" else iter(_open(file, key, streaming, by))
        while True:
            try:
                values = next(rows)
            except StopIteration:
                break
            except Exception as error:  # datasets passes on what each of its readers raises
                raise _unreadable(file, key, error) from None
            number += 1
            if FORMATS[file.suffix] == "text" and by != "line" and not values["text"].strip():
                continue
            yield Row(values, file, number, by)


def value_of(row: Row, column: str, *, key: str, kind: type[Any] | tuple[type[Any], ...]) -> Any:
    """The row's value in `column`.

    Raises:
        ConfigError: there is no such column, or no value of that kind.
    """
    if column not in row.values:
        raise ConfigError(
            f"{key}: {row.where}: no column {column!r}, only: {', '.join(map(str, row.values))}"
        )
    value = row.values[column]
    if not isinstance(value, kind):
        got = "no value" if value is None else f"{value!r:.60} ({type(value).__name__})"
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ConfigError(f"{key}: {row.where}: column {column!r} has {got}; wanted {names}")
    return value


def import_datasets() -> Any:
    """The `datasets` library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        found = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"data: reading files of text needs {error.name}; pip install 'sharded_spd[job]' brings it"
        ) from None
    # It asks a server to count each reading of a local file, and waits for seconds where there is no network.
    found.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    found.disable_progress_bars()
    found.logging.set_verbosity(found.logging.CRITICAL)
    return found


def _open(file: Path, key: str, streaming: bool, by: By) -> Any:
    kind = FORMATS[file.suffix]
    options: dict[str, Any] = {}
    if kind == "text":
        options["sample_by"] = by
    if file.suffix == ".tsv":
        options["sep"] = "\t"
    if kind == "csv":
        options["keep_default_na"] = False  # a text such as "NA" or "null" is a text
    datasets = import_datasets()
    try:
        return datasets.load_dataset(
            kind, data_files=[str(file)], split="train", streaming=streaming, **options
        )
    except Exception as error:  # as above
        if "no data" in str(error) or "BatchSize" in str(error):  # a header, or a schema, and nothing else
            return []
        raise _unreadable(file, key, error) from None


def _unreadable(file: Path, key: str, error: BaseException) -> ConfigError:
    fault = first_fault(file)
    if fault is not None:
        return ConfigError(f"{key}: {file}, {fault}")
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return ConfigError(f"{key}: {file} cannot be read as {FORMATS[file.suffix]}: {text:.300}")


def _place(file: Path, number: int, by: str) -> str:
    """Where row `number` (from 0) stands: found by reading up to it, since nobody asks twice."""
    if file.suffix in (".jsonl", ".ndjson"):
        with open(file, encoding="utf-8", errors="replace") as lines:
            full = (at for at, line in enumerate(lines, start=1) if line.strip())
            return f"line {next((at for row, at in enumerate(full) if row == number), number + 1)}"
    if FORMATS[file.suffix] == "csv":
        with open(file, encoding="utf-8", errors="replace", newline="") as lines:
            reader = csv.reader(lines, delimiter=separator(file))
            row = -2  # the header is no row
            for cells in reader:
                row += bool(cells)
                if row == number:
                    return f"line {reader.line_num}"
    if FORMATS[file.suffix] == "text":
        return f"{by} {number + 1}"
    return f"row {number + 1}"
