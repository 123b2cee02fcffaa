"""OpenAI batch files: one request per JSON line in, one response per JSON line out.

The form is that of the Batch API (``custom_id``, ``method``, ``url``, ``body`` in; ``id``, ``custom_id``,
``response``, ``error`` out) for ``/v1/completions`` and ``/v1/chat/completions``; ``top_k``, ``min_p``,
``repetition_penalty`` and ``ignore_eos`` are taken too, as vLLM does.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from flexbatch.apps.jobs.columns import ROW_ERROR
from flexbatch.apps.jobs.layout import Part
from flexbatch.apps.jobs.results import Record, failure_text, write_lines
from flexbatch.apps.jobs.rows import Row, RowError, messages_prompt, row_error, row_seed, unicode_text
from flexbatch.apps.jobs.text_sources import LINE
from flexbatch.apps.jobs.token_texts import CONTEXT, TokenTexts, places_in
from flexbatch.request import Completion, SamplingParams, TokenLogprob
from flexbatch.text.files import parse_json, short, split_lines

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
NUMBERS = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "min_p", "repetition_penalty")
WHOLE = ("n", "seed", "top_k", "max_tokens")
PLAIN = (*NUMBERS, *WHOLE, "ignore_eos", "stop")
IGNORED = (
    "model",
    "prompt",
    "messages",
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "user",
    "metadata",
    "store",
    "service_tier",
)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,), "echo": (False,), "best_of": (1,), "suffix": ("",), "tools": ([],), "functions": ([],), "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "stream_options": ({},),
}  # fmt: skip
"""Fields that are refused unless they say what happens anyway."""
MAX_DOUBLE = sys.float_info.max
TOKEN_ID = re.compile(r"0|[1-9]\d{0,17}", re.ASCII)
"""One spelling each: of two for one token, one bias would be dropped."""


@dataclass(frozen=True)
class Call:
    """What the response repeats of its request."""

    custom_id: str | None
    url: str
    model: str
    logprobs: int | None = None


class RequestError(RowError):
    """A request that cannot be served; ``code`` is the word that the response carries, ``call`` what was read of the
    request.
    """

    def __init__(self, code: str, message: str, call: Call | None = None) -> None:
        super().__init__(message)
        self.code, self.call = code, call


def custom_id_of(line: bytes) -> str | None:
    """What tells one request of a file from another; None where the line has none."""
    try:
        found = parse_json(line)
    except ValueError:
        return None
    custom_id = found.get("custom_id") if isinstance(found, dict) else None
    return custom_id if isinstance(custom_id, str) else None


def parse_request(
    line: bytes | str, defaults: SamplingParams, chat_limit: int | None = None
) -> tuple[Call, Any, SamplingParams]:
    """Call, prompt and sampling parameters of one line. ``chat_limit`` is for chat requests without a limit: None is
    the rest of the context.

    Raises RequestError, with the call as far as it was read in ``call``, whatever the line holds.
    """
    call: Call | None = None
    try:
        value = parse_json(line)
        if not isinstance(value, dict):
            raise RequestError("invalid_json_line", f"not a JSON object but a {type(value).__name__}")
        call = _call(value)
        body = _checked_body(value, call)
        if call.url == CHAT:
            defaults = dataclasses.replace(defaults, max_tokens=chat_limit)
        params = _params(body, call.url, defaults)
        prompt = messages_prompt(body.get("messages"), "messages") if call.url == CHAT else _prompt(body.get("prompt"))
        model = body.get("model")
        if model is not None and not isinstance(model, str):
            raise RequestError("invalid_type", f"model is {short(model)}, not text")
        call = dataclasses.replace(call, model=unicode_text(model or "", "model"), logprobs=params.logprobs)
        return call, prompt, params
    except Exception as error:
        known = "invalid_json_line" if call is None else "invalid_value"
        code = error.code if isinstance(error, RequestError) else known
        raise RequestError(code, str(row_error(error)), call) from None


def _call(value: Mapping[str, Any]) -> Call:
    custom_id, url = value.get("custom_id"), value.get("url")
    return Call(custom_id if isinstance(custom_id, str) else None, url if isinstance(url, str) else "", "")


def _checked_body(value: Mapping[str, Any], call: Call) -> Mapping[str, Any]:
    """The body of a request that is otherwise in order. Raises RequestError."""
    if call.custom_id is None:
        raise RequestError("missing_required_parameter", "custom_id is missing or not a string")
    unicode_text(call.custom_id, "custom_id")
    if value.get("method") not in (None, "POST"):
        raise RequestError("invalid_method", f"method is {short(value['method'])}, only POST is known")
    if call.url not in (COMPLETIONS, CHAT):
        raise RequestError("invalid_url", f"url is {short(value.get('url'))}, wanted {COMPLETIONS} or {CHAT}")
    body = value.get("body")
    if not isinstance(body, dict):
        raise RequestError("missing_required_parameter", "body is missing or not an object")
    return body


def _prompt(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return unicode_text(value, "prompt")
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        return value
    raise RowError("prompt must be a text or a list of token ids; send several prompts as several lines")


def _params(body: Mapping[str, Any], url: str, defaults: SamplingParams) -> SamplingParams:
    """Null is as good as absent. Raises RequestError that names the field, ValueError for values out of range."""
    for name, value in body.items():
        if name not in PLAIN and name not in IGNORED and value is not None and value not in NEUTRAL.get(name, ()):
            raise RequestError("unsupported_parameter", f"{short(name)} is not supported")
    changes: dict[str, Any] = {name: _number(body, name, float) for name in NUMBERS if body.get(name) is not None}
    changes |= {name: _number(body, name, int) for name in WHOLE if body.get(name) is not None}
    if body.get("max_completion_tokens") is not None:
        changes["max_tokens"] = _number(body, "max_completion_tokens", int)
    if body.get("ignore_eos") is not None:
        changes["ignore_eos"] = _flag(body, "ignore_eos")
    if body.get("stop") is not None:
        changes["stop"] = _stop(body["stop"])
    if body.get("logit_bias") is not None:
        changes["logit_bias"] = _logit_bias(body["logit_bias"]) or None
    logprobs = _logprobs(body, url)
    if logprobs is not None:
        changes["logprobs"] = logprobs
    return dataclasses.replace(defaults, **changes)


def _wrong_type(name: str, value: Any, wanted: str) -> RequestError:
    return RequestError("invalid_type", f"{name} is {short(value)}, wanted {wanted}")


def _number(body: Mapping[str, Any], name: str, kind: type) -> Any:
    value = body[name]
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise _wrong_type(name, value, "a whole number" if kind is int else "a number")
    if not (-(2**63) <= value < 2**63 if kind is int else -MAX_DOUBLE <= value <= MAX_DOUBLE):
        raise RequestError("invalid_value", f"{name} is {short(value)}, which is out of range")
    return kind(value)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    if not isinstance(body[name], bool):
        raise _wrong_type(name, body[name], "true or false")
    return body[name]


def _stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise _wrong_type("stop", value, "a text or a list of texts")
    return tuple(unicode_text(texts, "stop"))


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise _wrong_type("logit_bias", value, "an object from token ids to numbers")
    for token in value:
        if not TOKEN_ID.fullmatch(token):
            raise RequestError("invalid_value", f"logit_bias names {short(token)}, which is no token id")
    return {int(token): _number({"logit_bias": bias}, "logit_bias", float) for token, bias in value.items()}


def _logprobs(body: Mapping[str, Any], url: str) -> int | None:
    """Chat asks with true or false and ``top_logprobs``, completions with a number."""
    wanted = body.get("logprobs")
    if url != CHAT:
        return None if wanted is None or wanted is False else _number(body, "logprobs", int)
    top = _number(body, "top_logprobs", int) if body.get("top_logprobs") is not None else 0
    if wanted is None or not _flag(body, "logprobs"):
        if top:
            raise RequestError("invalid_value", f"top_logprobs is {top}, but logprobs is not true")
        return None
    return top


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
    ``texts``, which shows tokens of log-probabilities, is known once there is a tokenizer. ``chat_limit`` as in
    `parse_request`; ``repeated`` has the rows whose custom_id is that of an earlier one, which it has too.
    """

    suffix = ".jsonl"

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        identity: str,
        created: int,
        chat_limit: int | None = None,
        repeated: Mapping[int, int] | None = None,
    ) -> None:
        self._params, self._seed, self._identity, self.created = params, seed, identity, created
        self._chat_limit, self._repeated = chat_limit, dict(repeated or {})
        self.texts: TokenTexts | None = None

    def rows(self, table: pa.Table, part: Part, skip: Callable[[int], bool]) -> Iterator[Row]:
        problems = table[ROW_ERROR].to_pylist() if ROW_ERROR in table.schema.names else [None] * len(table)
        for offset, (line, problem) in enumerate(zip(table[LINE].to_pylist(), problems, strict=True)):
            if not skip(offset):
                index = part.first_row + offset
                try:
                    if problem is not None:
                        raise RequestError("invalid_json_line", problem)
                    call, prompt, params = self._request(line, index)
                    yield Row(part.number, offset, index, prompt, params, extra=call)
                except RequestError as error:
                    yield Row(part.number, offset, index, error=str(error), extra=(error.call, error.code))

    def _request(self, line: bytes, index: int) -> tuple[Call, Any, SamplingParams]:
        call, prompt, params = parse_request(line, self._params, self._chat_limit)
        if index in self._repeated:
            told = f"custom_id {short(call.custom_id)} is that of row {self._repeated[index]} already"
            raise RequestError("duplicate_custom_id", told, call)
        if params.seed is None and params.temperature > 0:
            params = dataclasses.replace(params, seed=row_seed(self._seed, index))
        return call, prompt, params

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
            "choices": [self._choice(place, sample, call) for place, sample in enumerate(samples)],
            "usage": {"prompt_tokens": used, "completion_tokens": made, "total_tokens": used + made},
        }
        response = {"status_code": 200, "request_id": f"req-{self._identity}-{row.index}", "body": body}
        return {
            "id": f"batch_req_{self._identity}-{row.index}",
            "custom_id": call.custom_id,
            "response": response,
            "error": None,
        }

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
        return [
            Step(offset, dataclasses.replace(shown[0], piece=kept), shown)
            for (offset, kept), shown in zip(places, drawn, strict=True)
        ]

    def failure(self, row: Row, message: str) -> Record:
        call, code = row.extra if isinstance(row.extra, tuple) else (row.extra, "invalid_request")
        error = {"code": code, "message": failure_text(message)}
        return {
            "id": f"batch_req_{self._identity}-{row.index}",
            "custom_id": call.custom_id if call else None,
            "response": None,
            "error": error,
        }

    def error_of(self, record: Record) -> str:
        return record["error"]["message"] if record["error"] else ""

    def tokens_of(self, record: Record) -> tuple[int, int]:
        usage = (
            record["response"]["body"]["usage"] if record["response"] else {"prompt_tokens": 0, "completion_tokens": 0}
        )
        return usage["prompt_tokens"], usage["completion_tokens"]

    def write(self, path: Path, table: pa.Table, records: Sequence[Record]) -> None:
        write_lines(path, records)

    def read(self, path: Path, rows: int) -> list[Record]:
        try:
            records = [json.loads(line) for line in split_lines(path.read_bytes().decode())]
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        if len(records) != rows:
            raise ValueError(f"{path} holds {len(records)} lines, this job's part has {rows}")
        return records
