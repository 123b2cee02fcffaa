"""Completions as JSON objects, one for each prompt."""

from __future__ import annotations

from typing import Any

from flexbatch.cli.prompt_files import PromptRow
from flexbatch.request import Completion

RESULTS = (
    *("prompt", "text", "token_ids", "finish_reason", "logprobs", "prompt_logprobs"),
    *("num_input_tokens", "num_generated_tokens", "samples", "error"),
)
"""Names of what a completion adds to its row."""


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
