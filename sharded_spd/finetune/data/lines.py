"""Files of text line by line: JSON as rows, and the first line that is not what its format wants."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def json_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file: one per line, or (in .json) a list of them.

    Raises:
        ValueError, RecursionError: something else; `first_fault` knows where.
    """
    if file.suffix == ".json" and _is_list(file):
        for found in _parse(file.read_text(encoding="utf-8-sig")):
            if not isinstance(found, dict):
                raise ValueError(f"the list holds a {type(found).__name__}; wanted objects only")
            yield found
        return
    with open(file, encoding="utf-8-sig") as lines:
        for line in lines:
            if line.strip():
                found = _parse(line)
                if not isinstance(found, dict):
                    raise ValueError("wanted objects")
                yield found


def _parse(text: str) -> Any:
    """JSON, without duplicate keys and without lone surrogates.

    Raises:
        ValueError, RecursionError: it is something else.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {twice!r} stands twice in an object")
        return found

    found = json.loads(text, object_pairs_hook=once)
    if "\\ud" in text or "\\uD" in text:
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    return found


def first_fault(file: Path) -> str | None:
    """The first line that is no text, or not what its format wants; None where lines do not tell."""
    if file.suffix == ".parquet":
        return None
    by_line = file.suffix in (".jsonl", ".ndjson") or (file.suffix == ".json" and not _is_list(file))
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"line {number}: is not text in UTF-8: {error.reason} at byte {error.start + 1}"
            fault = _fault_of_json(text.strip().lstrip("\ufeff")) if by_line else None
            if fault is not None:
                return f"line {number}: {fault}"
    if file.suffix == ".json" and not by_line:
        try:
            _parse(file.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            return f"line {error.lineno}: is not JSON: {error.msg}"
        except (ValueError, RecursionError):
            return None  # told by the reader
    return _fault_of_table(file) if file.suffix in (".csv", ".tsv") else None


def _is_list(file: Path) -> bool:
    with open(file, encoding="utf-8-sig", errors="replace") as text:
        return next((line.strip() for line in text if line.strip()), "").startswith("[")


def _fault_of_json(text: str) -> str | None:
    try:
        found = _parse(text) if text else {}
    except UnicodeEncodeError:
        return "holds half of a surrogate pair"
    except ValueError as error:
        return f"is not JSON: {error}"
    except RecursionError:
        return "is nested too deeply"
    return None if isinstance(found, dict) else f"is a JSON {type(found).__name__}; wanted an object"


def _fault_of_table(file: Path) -> str | None:
    with open(file, encoding="utf-8", newline="") as lines:
        reader = csv.reader(lines, delimiter=separator(file), strict=True)
        wanted, began = 0, 1
        try:
            for cells in reader:
                wanted = wanted or len(cells)
                if len(cells) > wanted:
                    return f"line {began}: has {len(cells)} fields, but the header {wanted}"
                began = reader.line_num + 1
        except csv.Error as error:
            return f"line {began}: {'a quote is not closed' if 'end of data' in str(error) else error}"
    return None


def separator(file: Path) -> str:
    """What stands between two fields of a table."""
    return "\t" if file.suffix == ".tsv" else ","
