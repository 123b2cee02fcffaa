"""What a run makes up and what it leaves: random prompts, and completions as JSON objects."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from flexbatch.cli.prompt_files import PromptRow
from flexbatch.memory.files import open_locked, remove_leftovers, temporary_name
from flexbatch.request import Completion
from flexbatch.validation.errors import ConfigurationError

RESULTS = (
    *("prompt", "text", "token_ids", "finish_reason", "logprobs", "prompt_logprobs"),
    *("num_input_tokens", "num_generated_tokens", "samples", "error"),
)
"""Names of what a completion adds to its row."""


def synthetic_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """`count` different prompts of `length` random token ids, the same ones for the same arguments."""
    return [random.Random(f"{seed} {index}").choices(range(vocab_size), k=length) for index in range(count)]


def output_line(row: PromptRow, completion: Completion) -> dict[str, Any]:
    """One completion as the output file and --json give it, after the fields of its row.

    A field that has the name of a result is carried as ``input_`` and its name, so that neither is lost.
    """
    line: dict[str, Any] = {
        "prompt": row.prompt,
        **_sample(completion),
        "num_input_tokens": len(completion.prompt_token_ids),
    }
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
    values: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
    }
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

    Opened at once, so that a folder that cannot be written to is found before hours of work. Raises
    ConfigurationError for that. What a killed run has left of the same file is removed.
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
