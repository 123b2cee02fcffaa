"""The responses to OpenAI batch files: one JSON line each, with ``id``, ``custom_id``, ``response`` and ``error``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from flexbatch.apps.jobs.openai_logprobs import TokenTexts, chat_logprobs, legacy_logprobs
from flexbatch.apps.jobs.openai_requests import CHAT, Call
from flexbatch.apps.jobs.results import RowRecord, failure_text
from flexbatch.apps.jobs.rows import RowRequest
from flexbatch.request import Completion
from flexbatch.text.files import split_lines


class OpenAIOutput:
    """JSON-lines parts of a batch file. ``identity``, a digest of the job, makes the ids of its responses."""

    suffix = ".jsonl"

    def __init__(self, identity: str) -> None:
        self._identity = identity
        self._created = 0
        self._texts: TokenTexts | None = None

    def start(self, created: int, tokenizer: Any) -> None:
        self._created, self._texts = created, TokenTexts(tokenizer)

    def record(self, row: RowRequest, completion: Completion) -> RowRecord:
        if completion.finish_reason == "error":
            return self.failure(row, completion.bare_error)
        call: Call = row.extra
        samples = completion.samples or [completion]
        used, made = len(completion.prompt_token_ids), sum(len(sample.token_ids) for sample in samples)
        chat = call.url == CHAT
        body = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self._identity}-{row.index}",
            "object": "chat.completion" if chat else "text_completion",
            "created": self._created,
            "model": call.model,
            "choices": [self._choice(index, sample, call) for index, sample in enumerate(samples)],
            "usage": {"prompt_tokens": used, "completion_tokens": made, "total_tokens": used + made},
        }
        response = {"status_code": 200, "request_id": f"req-{self._identity}-{row.index}", "body": body}
        return {
            "id": f"batch_req_{self._identity}-{row.index}",
            "custom_id": call.custom_id,
            "response": response,
            "error": None,
        }

    def _choice(self, index: int, sample: Completion, call: Call) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": sample.finish_reason}
        steps = None
        if sample.logprobs is not None:
            assert self._texts is not None, "log-probabilities are shown before there is a tokenizer"
            steps = self._texts.steps(sample)
        if call.url != CHAT:
            return {**choice, "text": sample.text, "logprobs": None if steps is None else legacy_logprobs(steps)}
        content = None if steps is None else {"content": [chat_logprobs(step, call.logprobs or 0) for step in steps]}
        return {**choice, "message": {"role": "assistant", "content": sample.text}, "logprobs": content}

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

    def tokens_of(self, record: RowRecord) -> tuple[int, int]:
        usage = (
            record["response"]["body"]["usage"] if record["response"] else {"prompt_tokens": 0, "completion_tokens": 0}
        )
        return usage["prompt_tokens"], usage["completion_tokens"]

    def write(self, path: Path, table: pa.Table, records: Sequence[RowRecord]) -> None:
        with path.open("wb") as file:
            for record in records:
                try:
                    line = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
                except UnicodeEncodeError:  # half of a surrogate pair, which no text can hold as it is, is escaped
                    line = json.dumps(record, separators=(",", ":")).encode()
                file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self, path: Path, rows: int) -> list[RowRecord]:
        try:
            records = [json.loads(line) for line in split_lines(path.read_bytes().decode())]
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        if len(records) != rows:
            raise ValueError(f"{path} holds {len(records)} lines, this job's part has {rows}")
        return records
