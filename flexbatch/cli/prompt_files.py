"""Prompts from files, with the fields beside them. Nothing in a file is executed, and nothing that is read is
changed."""

from __future__ import annotations

import io
import math
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexbatch.cli.run_settings import STANDARD_INPUT
from flexbatch.text.csv_rows import CsvRows, delimiter_of
from flexbatch.text.files import decode_text, parse_json, read_text, split_lines, with_doubles
from flexbatch.validation.checks import short
from flexbatch.validation.errors import ConfigurationError, reason

LONGEST_LINE = 64 * 2**20
"""Characters of a line of CSV."""
BUNDLED_PROMPTS = Path(__file__).parents[1] / "data" / "prompts.jsonl"


@dataclass(frozen=True)
class PromptRow:
    """A prompt and what the input says beside it, which the output carries."""

    prompt: Any
    fields: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: str | Path) -> list[PromptRow]:
    """Prompts of a file: .txt (one a line, blank lines left out), .json (a list), .jsonl (one value a line), .csv,
    .tsv or .parquet (column ``prompt``); of standard input, named "-", JSON lines where every line is an object with a
    ``prompt`` or a list, else lines of text.

    A value is a prompt, or an object whose ``prompt`` is one; a prompt is text, token ids or chat messages. The
    object's other keys, and the other columns, are the row's fields. A number among them that no double holds digit by
    digit is a Decimal.
    Raises ConfigurationError that names the file and the line, element or row and column.
    """
    if "://" in str(path):
        raise ConfigurationError(f"{path}: prompts are read from a file of this machine; flexbatch batch reads URIs")
    if str(path) == STANDARD_INPUT:
        rows = list(_read_standard_input())
        if not rows:
            raise ConfigurationError("standard input holds no prompts")
        return rows
    path = Path(path)
    readers: dict[str, Callable[[Path], Iterator[PromptRow]]] = {
        ".txt": lambda path: _text_rows(read_text(path)),
        ".json": _read_json,
        ".jsonl": lambda path: _json_rows(read_text(path), str(path)),
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": _read_parquet,
    }
    if path.suffix.lower() not in readers:
        raise ConfigurationError(f"{path}: the kind of a prompt file is told by its ending: {', '.join(readers)}")
    try:
        rows = list(readers[path.suffix.lower()](path))
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {reason(error)}") from error
    if not rows:
        raise ConfigurationError(f"{path}: holds no prompts")
    return rows


def _read_standard_input() -> Iterator[PromptRow]:
    # A stream that stands in for it in Python may have no bytes below.
    binary = getattr(sys.stdin, "buffer", None)
    name = "standard input"
    text = decode_text(sys.stdin.read().encode() if binary is None else binary.read(), name)
    lines = [line for line in split_lines(text) if line.strip()]
    return _json_rows(text, name) if lines and all(map(_is_json_prompt, lines)) else _text_rows(text)


def _is_json_prompt(line: str) -> bool:
    if line.lstrip()[0] not in "{[":
        return False
    try:
        value = parse_json(line, exact=True, constants=True)
    except ValueError:
        return False
    return isinstance(value, list) or "prompt" in value


def _text_rows(text: str) -> Iterator[PromptRow]:
    return (PromptRow(line) for line in split_lines(text) if line.strip())


def _read_csv(path: Path) -> Iterator[PromptRow]:
    """All cells are text, as they were written."""
    rows = iter(CsvRows(io.StringIO(read_text(path), newline=""), str(path), delimiter_of(path.name), LONGEST_LINE))
    _, header = next(rows, (1, []))
    if "prompt" not in header:
        raise ConfigurationError(f'{path}: has no column "prompt"; its header has {", ".join(header) or "nothing"}')
    _refuse_repeated(path, header)
    for number, cells in rows:
        if len(cells) != len(header):
            raise ConfigurationError(f"{path}: line {number} has {len(cells)} cells, the header has {len(header)}")
        yield _row_of(dict(zip(header, cells, strict=True)), f"{path}: line {number}")


def _refuse_repeated(path: Path, names: list[str]) -> None:
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigurationError(f"{path}: column names repeat: {', '.join(repeated)}")


def _read_json(path: Path) -> Iterator[PromptRow]:
    values = _parsed(read_text(path), str(path))
    if not isinstance(values, list):
        raise ConfigurationError(f"{path}: needs a list of prompts; it holds a {type(values).__name__}")
    return (_row_of(value, f"{path}: element {index}") for index, value in enumerate(values))


def _json_rows(text: str, name: str) -> Iterator[PromptRow]:
    for number, line in enumerate(split_lines(text), 1):
        if line.strip():
            yield _row_of(_parsed(line, f"{name}: line {number}"), f"{name}: line {number}")


def _parsed(text: str, location: str) -> Any:
    try:
        return parse_json(text, exact=True, constants=True)
    except ValueError as error:
        raise ConfigurationError(
            f"{location} is {error}" if str(error).startswith("not ") else f"{location}: {error}"
        ) from None


def _row_of(value: Any, location: str) -> PromptRow:
    fields: dict[str, Any] = {}
    if isinstance(value, dict):
        if "prompt" not in value:
            raise ConfigurationError(f'{location} has no "prompt"; it has {", ".join(value) or "nothing"}')
        fields = {name: with_doubles(content, exact=True) for name, content in value.items() if name != "prompt"}
        value = value["prompt"]
    if not isinstance(value, str | list):
        raise ConfigurationError(
            f"{location} holds a {type(value).__name__}; "
            "a prompt is text, a list of token ids or a list of chat messages"
        )
    if isinstance(value, list) and not (_all(value, int) or _all(value, dict)):
        wrong = next((item for item in value if not isinstance(item, int | dict) or isinstance(item, bool)), None)
        has = "token ids and chat messages" if wrong is None else short(wrong)
        raise ConfigurationError(f"{location} is a list that holds {has}; a list is either of token ids or of messages")
    return PromptRow(with_doubles(value), fields)


def _all(values: list[Any], kind: type) -> bool:
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)


def _read_parquet(path: Path) -> Iterator[PromptRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as stream:
            file = pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
            names = file.schema_arrow.names
            if "prompt" not in names:
                raise ConfigurationError(f'{path}: has no column "prompt"; it has {", ".join(names)}')
            _refuse_repeated(path, names)
            table = file.read()
    except pyarrow.ArrowException as error:
        raise ConfigurationError(f"{path}: is not a Parquet file: {error}") from error
    columns = [_column(column, name, path) for name, column in zip(names, table.columns, strict=True)]
    rows = (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))
    return (_row_of(row, f"{path}: row {index}") for index, row in enumerate(rows))


def _column(column: Any, name: str, path: Path) -> list[Any]:
    """The values of a column as JSON has them. Bytes of the prompts are text."""
    values = []
    for index, cell in enumerate(column):
        location = f"{path}: row {index}, column {name!r}"
        try:
            value = _value(cell)
            value = value.decode() if name == "prompt" and isinstance(value, bytes) else value
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"{location} is not UTF-8: {error.reason} at byte {error.start}") from None
        except (ValueError, LookupError, ArithmeticError) as error:
            raise ConfigurationError(f"{location} cannot be read as JSON: {error}") from None
        values.append(_as_json(value))
    return values


def _value(cell: Any) -> Any:
    """The value of a cell in Python. Times that Python does not have, such as the year 10000 or nanoseconds, are as
    Arrow writes them."""
    import pyarrow

    if pyarrow.types.is_temporal(cell.type) and not pyarrow.types.is_interval(cell.type):
        text = cell.cast(pyarrow.string()) if not pyarrow.types.is_duration(cell.type) else None
        if getattr(cell.type, "unit", "") == "ns" and text is not None:
            return text.as_py()
        try:
            return cell.as_py()
        except (ValueError, OverflowError):
            return cell.cast(pyarrow.int64()).as_py() if text is None else text.as_py()
    return cell.as_py()


def _as_json(value: Any) -> Any:
    """A value of a Parquet column as JSON has it: bytes in base64, numbers that are none as null, times and decimals as
    they are written."""
    if isinstance(value, dict):
        return {str(name): _as_json(content) for name, content in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(content) for content in value]
    if isinstance(value, bytes):
        return b64encode(value).decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
