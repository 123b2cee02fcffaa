"""What a run is given and what it leaves: prompts from files or made up, with the fields beside them, and completions as JSON objects."""

from __future__ import annotations

import io
import json
import math
import os
import random
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from flexbatch.config import ConfigurationError
from flexbatch.memory.files import open_locked, remove_leftovers, temporary_name
from flexbatch.request import Completion

BUNDLED_PROMPTS = Path(__file__).parent / "data" / "prompts.jsonl"
RESULTS = (
    *("prompt", "text", "token_ids", "finish_reason", "logprobs", "prompt_logprobs"),
    *("num_input_tokens", "num_generated_tokens", "samples", "error"),
)
"""Names of what a completion adds to its row."""


@dataclass(frozen=True)
class PromptRow:
    """A prompt and what the input says beside it, which the output carries."""

    prompt: Any
    fields: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: str | Path) -> list[PromptRow]:
    """Prompts of a file: .txt (one a line, empty lines left out), .json (a list), .jsonl (one value a line), .parquet (column ``prompt``).

    A value is a prompt, or an object whose ``prompt`` is one; a prompt is text, token ids or chat messages. The object's other keys, and the other columns,
    are the row's fields. Nothing in the file is executed.
    Raises ConfigurationError that names the file and the line, element or column.
    """
    path = Path(path)
    readers = {".txt": _read_text, ".json": _read_json, ".jsonl": _read_json_lines, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise ConfigurationError(f"{path}: the kind of a prompt file is told by its ending: {', '.join(readers)}")
    try:
        rows = list(readers[path.suffix.lower()](path))
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path}: is not UTF-8 text: {error}") from error
    if not rows:
        raise ConfigurationError(f"{path}: holds no prompts")
    return rows


def _read_text(path: Path) -> Iterator[PromptRow]:
    return (PromptRow(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip())


def _read_json(path: Path) -> Iterator[PromptRow]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"{path}: is not JSON: {error}") from error
    if not isinstance(values, list):
        raise ConfigurationError(f"{path}: needs a list of prompts; it holds a {type(values).__name__}")
    return (_row_of(value, f"{path}: element {index}") for index, value in enumerate(values))


def _read_json_lines(path: Path) -> Iterator[PromptRow]:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigurationError(f"{path}: line {number} is not JSON: {error}") from error
            yield _row_of(value, f"{path}: line {number}")


def _row_of(value: Any, place: str) -> PromptRow:
    fields: dict[str, Any] = {}
    if isinstance(value, dict):
        if "prompt" not in value:
            raise ConfigurationError(f'{place} has no "prompt"; it has {", ".join(value) or "nothing"}')
        fields = {name: content for name, content in value.items() if name != "prompt"}
        value = value["prompt"]
    if not isinstance(value, str | list):
        raise ConfigurationError(f"{place} holds a {type(value).__name__}; a prompt is text, a list of token ids or a list of chat messages")
    return PromptRow(value, fields)


def _read_parquet(path: Path) -> list[PromptRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as stream:
            file = pyarrow.parquet.ParquetFile(stream)
            if "prompt" not in file.schema_arrow.names:
                raise ConfigurationError(f'{path}: has no column "prompt"; it has {", ".join(file.schema_arrow.names)}')
            rows = file.read().to_pylist()
    except pyarrow.ArrowException as error:
        raise ConfigurationError(f"{path}: is not a Parquet file: {error}") from error
    return [_row_of(_as_json(row), f"{path}: row {index}") for index, row in enumerate(rows)]


def _as_json(value: Any) -> Any:
    """A value of a Parquet column as JSON has it: bytes in base64, numbers that are none as null, times and decimals as they are written."""
    if isinstance(value, dict):
        return {str(name): _as_json(content) for name, content in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(content) for content in value]
    if isinstance(value, bytes):
        return b64encode(value).decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def synthetic_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """`count` different prompts of `length` random token ids, the same ones for the same arguments."""
    return [random.Random(f"{seed} {index}").choices(range(vocab_size), k=length) for index in range(count)]


def output_line(row: PromptRow, completion: Completion) -> dict[str, Any]:
    """One completion as the output file and --json give it, after the fields of its row.

    A field that has the name of a result is carried as ``input_`` and its name, so that neither is lost.
    """
    line: dict[str, Any] = {"prompt": row.prompt, **_sample(completion), "num_input_tokens": len(completion.prompt_token_ids)}
    line["num_generated_tokens"] = len(completion.token_ids)
    if completion.samples:
        line["samples"] = [_sample(sample) for sample in completion.samples]
    fields: dict[str, Any] = {}
    for name, value in row.fields.items():
        while name in RESULTS or name in fields:
            name = f"input_{name}"
        fields[name] = value
    return {**fields, **line}


def _sample(completion: Completion) -> dict[str, Any]:
    values: dict[str, Any] = {"text": completion.text, "token_ids": completion.token_ids, "finish_reason": completion.finish_reason}
    if completion.error:
        values["error"] = completion.error
    if completion.logprobs is not None:
        values["logprobs"] = [_logprobs(entry) for entry in completion.logprobs]
    if completion.prompt_logprobs is not None:
        values["prompt_logprobs"] = [entry and _logprobs(entry) for entry in completion.prompt_logprobs]
    return values


def _logprobs(entry: dict[int, Any]) -> list[dict[str, Any]]:
    """The chosen token first, then by rank."""
    return [{"token_id": item.token_id, "logprob": item.logprob, "rank": item.rank} for item in entry.values()]


@contextmanager
def whole_file(path: str | Path) -> Iterator[IO[str]]:
    """A text file that appears under its name when the body ends, whole, and not at all when it fails.

    Opened at once, so that a folder that cannot be written to is found before hours of work. Raises ConfigurationError for that. What a killed run
    has left of the same file is removed.
    """
    temporary = temporary_name(Path(path))
    try:
        remove_leftovers(Path(path))
        stream = io.TextIOWrapper(open_locked(temporary), encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"output {path}: cannot be written: {error.strerror}") from error
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            # While it is locked: until it has its name, another run may not take it for a leftover.
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
