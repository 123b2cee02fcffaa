"""The responses to requests of the OpenAI API: bodies, and batch files of them, one JSON line each with ``id``,
``custom_id``, ``response`` and ``error``."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from flexbatch.apps.jobs.openai_logprobs import Step, TokenTexts, chat_logprobs, legacy_logprobs
from flexbatch.apps.jobs.openai_requests import CHAT, Call
from flexbatch.apps.jobs.results import RowRecord, failure_text
from flexbatch.apps.jobs.rows import RowRequest
from flexbatch.request import Completion
from flexbatch.text.files import split_lines
from flexbatch.validation.errors import reason


class ResponseBodies:
    """Makes the bodies of responses, for batch files and for those who wait for one."""

    def __init__(self, tokenizer: Any) -> None:
        self.texts = TokenTexts(tokenizer)

    def body(self, id: str, created: int, row: RowRequest, completions: Sequence[Completion]) -> dict[str, Any]:
        """The whole answer to a request, from the completions of its prompts, in their order."""
        call: Call = row.extra
        answers = [
            (request, sample)
            for request, completion in zip(row.requests, completions, strict=True)
            for sample in completion.samples or [completion]
        ]
        return {
            **head(id, created, call),
            "choices": [
                self.choice(index, sample, call, request.prompt) for index, (request, sample) in enumerate(answers)
            ],
            "usage": usage(completions),
        }

    def choice(self, index: int, sample: Completion, call: Call, prompt: Any) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": sample.finish_reason}
        steps = None if sample.logprobs is None else self.texts.steps(sample)
        if call.url != CHAT:
            before = self.texts.text_of(prompt) if call.echo else ""
            if steps is not None and call.echo:
                moved = [dataclasses.replace(step, offset=step.offset + len(before)) for step in steps]
                steps = [*self.texts.prompt_steps(sample, before), *moved]
            return {**choice, "text": before + sample.text, "logprobs": shown_logprobs(steps, call)}
        message = {"role": "assistant", "content": sample.text}
        return {**choice, "message": message, "logprobs": shown_logprobs(steps, call)}


def head(id: str, created: int, call: Call, chunk: bool = False) -> dict[str, Any]:
    """The fields that an answer, or a ``chunk`` of one that is streamed, begins with."""
    name = f"chat.completion{'.chunk' * chunk}" if call.url == CHAT else "text_completion"
    return {"id": id, "object": name, "created": created, "model": call.model}


def usage(completions: Sequence[Completion]) -> dict[str, int]:
    """The tokens of the completions of a request's prompts."""
    used = sum(len(completion.prompt_token_ids) for completion in completions)
    made = sum(len(sample.token_ids) for each in completions for sample in each.samples or [each])
    return {"prompt_tokens": used, "completion_tokens": made, "total_tokens": used + made}


def shown_logprobs(steps: Sequence[Step] | None, call: Call) -> dict[str, Any] | None:
    """Log-probabilities in the form of the request's endpoint."""
    if steps is None:
        return None
    if call.url != CHAT:
        return legacy_logprobs(steps)
    return {"content": [chat_logprobs(step, call.logprobs or 0) for step in steps]}


def problem_of(row: RowRequest, completions: Sequence[Completion]) -> str:
    """Why a request has no answer: the first of its prompts that failed; empty where none did."""
    for number, completion in enumerate(completions):
        if completion.finish_reason == "error":
            return f"{f'prompt {number}: ' if row.prompts > 1 else ''}{completion.bare_error}"
    return ""


def json_line(record: RowRecord) -> bytes:
    try:
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which no text can hold as it is, is escaped
        line = json.dumps(record, separators=(",", ":")).encode()
    return line + b"\n"


class OpenAIOutput:
    """JSON-lines parts of a batch file. ``identity``, a digest of the job, makes the ids of its responses."""

    suffix = ".jsonl"

    def __init__(self, identity: str) -> None:
        self._identity = identity
        self._created = 0
        self._bodies: Any = None  # ResponseBodies from `start` on

    def start(self, created: int, tokenizer: Any) -> None:
        self._created, self._bodies = created, ResponseBodies(tokenizer)

    def record(self, row: RowRequest, completions: Sequence[Completion]) -> RowRecord:
        if problem := problem_of(row, completions):
            return self.failure(row, problem)
        call: Call = row.extra
        name = f"{'chatcmpl' if call.url == CHAT else 'cmpl'}-{self._identity}-{row.index}"
        body = self._bodies.body(name, self._created, row, completions)
        response = {"status_code": 200, "request_id": f"req-{self._identity}-{row.index}", "body": body}
        return {
            "id": f"batch_req_{self._identity}-{row.index}",
            "custom_id": call.custom_id,
            "response": response,
            "error": None,
        }

    def failure(self, row: RowRequest, message: str) -> RowRecord:
        call: Call = row.extra
        return {
            "id": f"batch_req_{self._identity}-{row.index}",
            "custom_id": call.custom_id,
            "response": None,
            "error": {"code": call.error_code, "message": failure_text(message)},
        }

    def error_of(self, record: RowRecord) -> str:
        return record["error"]["message"] if record["error"] else ""

    def is_truncated(self, record: RowRecord, tokens: int) -> bool:
        choices = record["response"]["body"]["choices"] if record["response"] else []
        cut = any(choice["finish_reason"] == "length" for choice in choices)
        return cut and self.tokens_of(record)[1] < tokens * len(choices)

    def tokens_of(self, record: RowRecord) -> tuple[int, int]:
        usage = (
            record["response"]["body"]["usage"] if record["response"] else {"prompt_tokens": 0, "completion_tokens": 0}
        )
        return usage["prompt_tokens"], usage["completion_tokens"]

    def write(self, path: Path, table: pa.Table, records: Sequence[RowRecord]) -> None:
        with path.open("wb") as file:
            for record in records:
                file.write(json_line(record))
            file.flush()
            os.fsync(file.fileno())

    def errors(self, path: Path) -> list[str]:
        return [error for record in self._records(path) if (error := self.error_of(record))]

    def _records(self, path: Path) -> list[RowRecord]:
        try:
            return [json.loads(line) for line in split_lines(path.read_bytes().decode())]
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {reason(error)}") from error

    def read(self, path: Path, rows: int) -> list[RowRecord]:
        records = self._records(path)
        if len(records) != rows:
            raise ValueError(f"{path} holds {len(records)} lines, this job's part has {rows}")
        return records
