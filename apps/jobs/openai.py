"""OpenAI batch files: one request per JSON line in, one response per JSON line out.

The form is that of the Batch API (``custom_id``, ``method``, ``url``, ``body`` in; ``id``, ``custom_id``, ``response``, ``error`` out) for
``/v1/completions`` and ``/v1/chat/completions``; ``top_k``, ``min_p``, ``repetition_penalty`` and ``ignore_eos`` are taken too, as vLLM does.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from flexbatch.apps.jobs.layout import Part
from flexbatch.apps.jobs.results import Record, write_lines
from flexbatch.apps.jobs.rows import Row, RowError, messages_prompt, row_seed
from flexbatch.apps.jobs.text_sources import LINE
from flexbatch.request import Completion, SamplingParams, TokenLogprob

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PLAIN = (
    "temperature",
    "top_p",
    "n",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "top_k",
    "min_p",
    "repetition_penalty",
    "ignore_eos",
    "stop",
    "max_tokens",
)
IGNORED = ("model", "prompt", "messages", "max_completion_tokens", "logprobs", "top_logprobs", "logit_bias", "user", "metadata", "store", "service_tier")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,), "echo": (False,), "best_of": (1,), "suffix": ("",), "tools": ([],), "functions": ([],), "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "stream_options": ({},),
}  # fmt: skip
"""Fields that are refused unless they say what happens anyway."""


@dataclass(frozen=True)
class Call:
    """What the response repeats of its request."""

    custom_id: str | None
    url: str
    model: str
    logprobs: int | None = None


class RequestError(RowError):
    """A request that cannot be served; ``code`` is the word that the response carries."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def parse_request(line: str, defaults: SamplingParams) -> tuple[Call, Any, SamplingParams]:
    """Call, prompt and sampling parameters of one line. Raises RequestError, with the call as far as it was read in ``call``."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise _refused(None, "invalid_json_line", f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise _refused(None, "invalid_json_line", "not a JSON object")
    custom_id = value.get("custom_id")
    call = Call(custom_id if isinstance(custom_id, str) else None, str(value.get("url")), "")
    if call.custom_id is None:
        raise _refused(call, "missing_required_parameter", "custom_id is missing or not a string")
    if value.get("method", "POST") != "POST":
        raise _refused(call, "invalid_method", f"method is {value['method']!r}, only POST is known")
    if call.url not in (COMPLETIONS, CHAT):
        raise _refused(call, "invalid_url", f"url is {value.get('url')!r}, wanted {COMPLETIONS} or {CHAT}")
    body = value.get("body")
    if not isinstance(body, dict):
        raise _refused(call, "missing_required_parameter", "body is missing or not an object")
    try:
        params = _params(body, call.url, defaults)
        prompt = messages_prompt(body.get("messages"), "messages") if call.url == CHAT else _prompt(body.get("prompt"))
    except (ValueError, TypeError) as error:
        raise _refused(call, getattr(error, "code", "invalid_value"), str(error)) from None
    return dataclasses.replace(call, model=str(body.get("model", "")), logprobs=params.logprobs), prompt, params


def _refused(call: Call | None, code: str, message: str) -> RequestError:
    error = RequestError(code, message)
    error.call = call  # type: ignore[attr-defined]
    return error


def _prompt(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(token) is int for token in value)):
        return value
    raise RowError("prompt must be a text or a list of token ids; send several prompts as several lines")


def _params(body: Mapping[str, Any], url: str, defaults: SamplingParams) -> SamplingParams:
    for name, value in body.items():
        if name not in PLAIN and name not in IGNORED and value is not None and value not in NEUTRAL.get(name, ()):
            raise RequestError("unsupported_parameter", f"{name} is not supported")
    changes = {name: body[name] for name in PLAIN if body.get(name) is not None}
    for name, value in changes.items():
        wanted: tuple[type, ...] = {"stop": (str, list), "ignore_eos": (bool,)}.get(
            name, (int,) if isinstance(getattr(defaults, name), int) or name == "seed" else (int, float)
        )
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            raise RequestError("invalid_type", f"{name} is {value!r}")
    if body.get("max_completion_tokens") is not None:
        changes["max_tokens"] = body["max_completion_tokens"]
    if body.get("logit_bias"):
        changes["logit_bias"] = {int(token): float(bias) for token, bias in body["logit_bias"].items()}
    wants = body.get("logprobs")
    if url == CHAT and wants:
        changes["logprobs"] = int(body.get("top_logprobs") or 0)
    elif wants is not None and wants is not False:
        changes["logprobs"] = int(wants)
    return dataclasses.replace(defaults, **changes)


class OpenAIOutput:
    """JSON-lines parts of a batch file. ``identity`` (a digest) makes the ids, ``created`` is the job's unix time; ``decode`` turns one token id into text."""

    suffix = ".jsonl"

    def __init__(self, params: SamplingParams, seed: int, identity: str, created: int) -> None:
        self._params, self._seed, self._identity, self.created = params, seed, identity, created
        self.decode: Callable[[int], str] = str

    def rows(self, table: pa.Table, part: Part, skip: Callable[[int], bool]) -> Iterator[Row]:
        for offset, line in enumerate(table[LINE].to_pylist()):
            if skip(offset):
                continue
            index = part.first_row + offset
            try:
                call, prompt, params = parse_request(line, self._params)
                if params.seed is None and params.temperature > 0:
                    params = dataclasses.replace(params, seed=row_seed(self._seed, index))
                yield Row(part.number, offset, index, prompt, params, extra=call)
            except RequestError as error:
                yield Row(part.number, offset, index, error=str(error), extra=(getattr(error, "call", None), error.code))

    def record(self, row: Row, completion: Completion) -> Record:
        if completion.finish_reason == "error":
            return self.failure(row, completion.bare_error)
        call: Call = row.extra
        samples = completion.samples or [completion]
        used, made = len(completion.prompt_token_ids), sum(len(sample.token_ids) for sample in samples)
        chat = call.url == CHAT
        body = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self._identity}-{row.index}",
            "object": "chat.completion" if chat else "text_completion",
            "created": self.created,
            "model": call.model,
            "choices": [self._choice(place, sample, chat) for place, sample in enumerate(samples)],
            "usage": {"prompt_tokens": used, "completion_tokens": made, "total_tokens": used + made},
        }
        response = {"status_code": 200, "request_id": f"req-{self._identity}-{row.index}", "body": body}
        return {"id": f"batch_req_{self._identity}-{row.index}", "custom_id": call.custom_id, "response": response, "error": None}

    def _choice(self, place: int, sample: Completion, chat: bool) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": place, "finish_reason": sample.finish_reason}
        if not chat:
            return {**choice, "text": sample.text, "logprobs": None if sample.logprobs is None else self._legacy_logprobs(sample)}
        content = None if sample.logprobs is None else {"content": [self._chat_logprobs(*step) for step in zip(sample.token_ids, sample.logprobs, strict=True)]}
        return {**choice, "message": {"role": "assistant", "content": sample.text}, "logprobs": content}

    def _chat_logprobs(self, token: int, step: Mapping[int, TokenLogprob]) -> dict[str, Any]:
        def entry(item: TokenLogprob) -> dict[str, Any]:
            text = self.decode(item.token_id)
            return {"token": text, "logprob": item.logprob, "bytes": list(text.encode())}

        best = sorted((item for item in step.values() if item.rank <= max(len(step) - 1, 1)), key=lambda item: item.rank)
        return {**entry(step[token]), "top_logprobs": [entry(item) for item in best] if len(step) > 1 else []}

    def _legacy_logprobs(self, sample: Completion) -> dict[str, Any]:
        texts = [self.decode(token) for token in sample.token_ids]
        steps = sample.logprobs or []
        return {
            "tokens": texts,
            "token_logprobs": [step[token].logprob for token, step in zip(sample.token_ids, steps, strict=True)],
            "top_logprobs": [{self.decode(item.token_id): item.logprob for item in step.values()} for step in steps],
            "text_offset": [sum(map(len, texts[:place])) for place in range(len(texts))],
        }

    def failure(self, row: Row, message: str) -> Record:
        call, code = row.extra if isinstance(row.extra, tuple) else (row.extra, "invalid_request")
        error = {"code": code, "message": message or "failed without a message"}
        return {"id": f"batch_req_{self._identity}-{row.index}", "custom_id": call.custom_id if call else None, "response": None, "error": error}

    def error_of(self, record: Record) -> str:
        return record["error"]["message"] if record["error"] else ""

    def tokens_of(self, record: Record) -> tuple[int, int]:
        usage = record["response"]["body"]["usage"] if record["response"] else {"prompt_tokens": 0, "completion_tokens": 0}
        return usage["prompt_tokens"], usage["completion_tokens"]

    def write(self, path: Path, table: pa.Table, records: Sequence[Record]) -> None:
        write_lines(path, records)

    def read(self, path: Path, rows: int) -> list[Record]:
        try:
            records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        if len(records) != rows:
            raise ValueError(f"{path} holds {len(records)} lines, this job's part has {rows}")
        return records
