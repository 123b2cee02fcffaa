"""The requests of OpenAI batch files: one JSON line each, with ``custom_id``, ``method``, ``url`` and ``body``.

Known are ``/v1/completions`` and ``/v1/chat/completions``, with the further fields that vLLM's server takes: those of
SamplingParams in `COPIED`, and `TEMPLATE` for the chat template.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexbatch.apps.jobs.prompts import RowError, messages_prompt, row_error, unicode_text
from flexbatch.apps.jobs.response_format import response_form
from flexbatch.request import SamplingParams
from flexbatch.text.chat import ChatOptions, ChatPrompt
from flexbatch.text.files import parse_json
from flexbatch.validation.checks import short

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
NUMBERS = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "min_p", "repetition_penalty")
WHOLE = ("n", "seed", "top_k", "max_tokens", "min_tokens", "truncate_prompt_tokens")
FLAGS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")
TEXTS, TOKENS = ("stop", "bad_words"), ("stop_token_ids", "allowed_token_ids")
COPIED = (*NUMBERS, *WHOLE, *FLAGS, *TEXTS, *TOKENS)
TEMPLATE = ("add_generation_prompt", "continue_final_message", "tools", "chat_template_kwargs")
MOST_PROMPTS = 2048
"""Of one request, as in the API."""
OTHER = (
    "model",
    "prompt",
    "messages",
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "echo",
    "logit_bias",
    "response_format",
    "structured_outputs",
    "user",
    "metadata",
    "store",
    "service_tier",
)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": ({},),
    "best_of": (1,),
    "suffix": ("",),
    **{name: ([], {}) for name in TEMPLATE},
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
}
"""Fields that are accepted only with a value that asks for what happens anyway."""
MAX_DOUBLE = sys.float_info.max
TOKEN_ID = re.compile(r"0|[1-9]\d{0,17}", re.ASCII)
"""A token id has one spelling: of two spellings of one token, one bias would be dropped."""


@dataclass(frozen=True)
class Call:
    """The part of a request that its response needs. ``error_code`` is the word for why the request fails, if it
    does."""

    custom_id: str | None = None
    url: str = ""
    model: str = ""
    logprobs: int | None = None
    echo: bool = False
    error_code: str = "invalid_request"


class RequestError(RowError):
    """A request that cannot be served. ``call`` holds what was read of it, and ``code`` for its response."""

    def __init__(self, code: str, message: str, call: Call | None = None) -> None:
        super().__init__(message)
        self.code, self.call = code, dataclasses.replace(call or Call(), error_code=code)


def parse_request(
    line: bytes | str, defaults: SamplingParams, chat_limit: int | None = None
) -> tuple[Call, list[Any], SamplingParams]:
    """Returns the call, the prompts and the sampling parameters of one line. ``chat_limit`` is the ``max_tokens`` of
    chat requests that set none; None means the rest of the context.

    Raises RequestError, with the call as far as it was read in ``call``, whatever the line holds.
    """
    call: Call | None = None
    try:
        value = parse_json(line)
        if not isinstance(value, dict):
            raise RequestError("invalid_json_line", f"not a JSON object but a {type(value).__name__}")
        custom_id, url = value.get("custom_id"), value.get("url")
        call = Call(custom_id if isinstance(custom_id, str) else None, url if isinstance(url, str) else "")
        return parse_body(_checked_body(value, call), call, defaults, chat_limit)
    except Exception as error:
        known = "invalid_json_line" if call is None else "invalid_value"
        code = error.code if isinstance(error, RequestError) else known
        raise RequestError(code, str(row_error(error)), call) from None


def parse_body(
    body: Mapping[str, Any], call: Call, defaults: SamplingParams, chat_limit: int | None = None
) -> tuple[Call, list[Any], SamplingParams]:
    """The same of the body of a request to the URL of ``call``. Raises RequestError, with ``call``."""
    try:
        chat = call.url == CHAT
        params = _params(body, call.url, dataclasses.replace(defaults, max_tokens=chat_limit) if chat else defaults)
        prompts = [_chat(body)] if chat else _prompts(body.get("prompt"))
        echo = body.get("echo") is not None and _flag(body, "echo")
        if echo and chat:
            raise RequestError("unsupported_parameter", "echo is for completions; a chat's prompt is its messages")
        if echo and params.logprobs is not None:
            params.prompt_logprobs = params.logprobs
        model = body.get("model")
        if model is not None and not isinstance(model, str):
            raise RequestError("invalid_type", f"model is {short(model)}, not text")
        name = unicode_text(model or "", "model")
        return dataclasses.replace(call, model=name, logprobs=params.logprobs, echo=echo), prompts, params
    except Exception as error:
        code = error.code if isinstance(error, RequestError) else "invalid_value"
        raise RequestError(code, str(row_error(error)), call) from None


def _checked_body(value: Mapping[str, Any], call: Call) -> Mapping[str, Any]:
    """Returns the body of a request that is otherwise in order. Raises RequestError."""
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


def _prompts(value: Any) -> list[Any]:
    """Returns the prompts of a completion: one text or list of token ids, or a list of these."""
    several = isinstance(value, list) and bool(value) and all(isinstance(each, str | list) for each in value)
    prompts = value if several else [value]
    if len(prompts) > MOST_PROMPTS:
        raise RowError(f"prompt has {len(prompts):,} prompts, more than the {MOST_PROMPTS:,} of one request")
    for index, prompt in enumerate(prompts):
        name = f"prompt {index}" if several else "prompt"
        if isinstance(prompt, str):
            unicode_text(prompt, name)
        elif not isinstance(prompt, list) or not prompt or not all(type(token) is int for token in prompt):
            raise RowError(f"{name} must be a text or a list of token ids{'' if several else ', or a list of these'}")
    return prompts


def _chat(body: Mapping[str, Any]) -> Any:
    """Returns the messages of a chat, with the options for its template where there are some."""
    messages = messages_prompt(body.get("messages"), "messages")
    given = {name: body[name] for name in TEMPLATE if body.get(name) is not None}
    for name in ("add_generation_prompt", "continue_final_message"):
        if name in given:
            _flag(given, name)
    unicode_text([given.get("tools"), given.get("chat_template_kwargs")], "tools or chat_template_kwargs")
    return ChatPrompt(messages, ChatOptions(**given)) if given else messages


def _params(body: Mapping[str, Any], url: str, defaults: SamplingParams) -> SamplingParams:
    """Returns the sampling parameters of a body, in which a null counts as absent. Raises RequestError that names
    the field, ValueError for values out of range."""
    known = {*COPIED, *OTHER, *(TEMPLATE if url == CHAT else ())}
    for name, value in body.items():
        if name not in known and value is not None and value not in NEUTRAL.get(name, ()):
            raise RequestError("unsupported_parameter", f"{short(name)} is not supported")
    changes: dict[str, Any] = {name: _number(body, name, float) for name in NUMBERS if body.get(name) is not None}
    changes |= {name: _number(body, name, int) for name in WHOLE if body.get(name) is not None}
    if body.get("max_completion_tokens") is not None:
        changes["max_tokens"] = _number(body, "max_completion_tokens", int)
    changes |= {name: _flag(body, name) for name in FLAGS if body.get(name) is not None}
    changes |= {name: _texts(name, body[name]) for name in TEXTS if body.get(name) is not None}
    changes |= {name: _tokens(name, body[name]) for name in TOKENS if body.get(name) is not None}
    if body.get("logit_bias") is not None:
        changes["logit_bias"] = _logit_bias(body["logit_bias"]) or None
    if (form := response_form(body)) is not None:
        changes["structured_outputs"] = form
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


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise _wrong_type(name, value, "a text or a list of texts")
    return tuple(unicode_text(texts, name))


def _tokens(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise _wrong_type(name, value, "a list of token ids")
    return tuple(value)


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise _wrong_type("logit_bias", value, "an object from token ids to numbers")
    for token in value:
        if not TOKEN_ID.fullmatch(token):
            raise RequestError("invalid_value", f"logit_bias names {short(token)}, which is no token id")
    return {int(token): _number({"logit_bias": bias}, "logit_bias", float) for token, bias in value.items()}


def _logprobs(body: Mapping[str, Any], url: str) -> int | None:
    """Returns the number of log-probabilities: chat asks with true or false and ``top_logprobs``, completions with a
    number."""
    wanted = body.get("logprobs")
    if url != CHAT:
        return None if wanted is None or wanted is False else _number(body, "logprobs", int)
    top = _number(body, "top_logprobs", int) if body.get("top_logprobs") is not None else 0
    if wanted is None or not _flag(body, "logprobs"):
        if top:
            raise RequestError("invalid_value", f"top_logprobs is {top}, but logprobs is not true")
        return None
    return top
