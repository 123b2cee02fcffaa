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
from flexbatch.apps.jobs.token_texts import CONTEXT, TokenTexts, places_in
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


@dataclass(frozen=True)
class Shown:
    """A token with its log-probability: its name, and its bytes in the text."""

    name: str
    piece: bytes
    item: TokenLogprob

    @property
    def logprob(self) -> float:
        """JSON has no infinity, so a token that cannot come gets what OpenAI and vLLM give it."""
        return max(self.item.logprob, -9999.0)

    def entry(self) -> dict[str, Any]:
        return {"token": self.name, "logprob": self.logprob, "bytes": list(self.piece)}


@dataclass(frozen=True)
class Step:
    """One token of an output: where it begins in the text, itself, and all tokens that are known there, itself
    first."""

    offset: int
    drawn: Shown
    known: Sequence[Shown]


def chat_logprobs(step: Step, count: int) -> dict[str, Any]:
    """The token, and the ``count`` most likely ones, itself among them or not."""
    best = sorted(step.known, key=lambda shown: (-shown.item.logprob, shown.item.rank))[:count]
    return {**step.drawn.entry(), "top_logprobs": [shown.entry() for shown in best]}


def legacy_logprobs(steps: Sequence[Step]) -> dict[str, Any]:
    return {
        "tokens": [step.drawn.name for step in steps],
        "token_logprobs": [step.drawn.logprob for step in steps],
        "top_logprobs": [{shown.name: shown.logprob for shown in step.known} for step in steps],
        "text_offset": [step.offset for step in steps],
    }


class OpenAIOutput:
    """JSON-lines parts of a batch file. ``identity`` (a digest) makes the ids, ``created`` is the job's unix time;
    ``texts``, which shows tokens of log-probabilities, is known once there is a tokenizer."""

    suffix = ".jsonl"

    def __init__(self, params: SamplingParams, seed: int, identity: str, created: int) -> None:
        self._params, self._seed, self._identity, self.created = params, seed, identity, created
        self.texts: TokenTexts | None = None

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
            return self.failure(row, completion.error)
        call: Call = row.extra
        samples = completion.samples or [completion]
        used, made = len(completion.prompt_token_ids), sum(len(sample.token_ids) for sample in samples)
        chat = call.url == CHAT
        body = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self._identity}-{row.index}",
            "object": "chat.completion" if chat else "text_completion",
            "created": self.created,
            "model": call.model,
            "choices": [self._choice(place, sample, call) for place, sample in enumerate(samples)],
            "usage": {"prompt_tokens": used, "completion_tokens": made, "total_tokens": used + made},
        }
        response = {"status_code": 200, "request_id": f"req-{self._identity}-{row.index}", "body": body}
        return {"id": f"batch_req_{self._identity}-{row.index}", "custom_id": call.custom_id, "response": response, "error": None}

    def _choice(self, place: int, sample: Completion, call: Call) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": place, "finish_reason": sample.finish_reason}
        steps = None if sample.logprobs is None else self._steps(sample)
        if call.url != CHAT:
            return {**choice, "text": sample.text, "logprobs": None if steps is None else legacy_logprobs(steps)}
        content = None if steps is None else {"content": [chat_logprobs(step, call.logprobs or 0) for step in steps]}
        return {**choice, "message": {"role": "assistant", "content": sample.text}, "logprobs": content}

    def _steps(self, sample: Completion) -> list[Step]:
        """The tokens of an output, each with its alternatives, as they are shown."""
        assert self.texts is not None, "log-probabilities are shown before there is a tokenizer"
        known = [*sample.prompt_token_ids, *sample.token_ids]
        start, drawn, pieces = len(sample.prompt_token_ids), [], []
        for place, entries in enumerate(sample.logprobs or []):
            token_ids = list(entries)  # the drawn one first
            found = self.texts.alternatives(known[max(0, start + place - CONTEXT) : start + place], token_ids)
            names = self.texts.names(token_ids, found)
            drawn.append(
                [Shown(name, piece, entry) for name, piece, entry in zip(names, found, entries.values(), strict=True)]
            )
            pieces.append(found[0])
        places = places_in(sample.text, pieces)
        return [Step(offset, dataclasses.replace(shown[0], piece=kept), shown) for (offset, kept), shown in zip(places, drawn, strict=True)]

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
