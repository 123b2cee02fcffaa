"""Answers as server-sent events: chunks of text as passes end, then the usage where it was asked for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from flexbatch.apps.jobs.openai_logprobs import Shown, placed
from flexbatch.apps.jobs.openai_requests import CHAT
from flexbatch.apps.jobs.openai_responses import ResponseBodies, head, shown_logprobs, usage
from flexbatch.apps.serve.errors import ApiError
from flexbatch.request import Completion, TokenLogprob

if TYPE_CHECKING:
    from flexbatch.apps.serve.answers import Answer

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class StreamOptions:
    """How a request wants its answer in chunks."""

    include_usage: bool = False

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> StreamOptions | None:
        """None where it wants the answer whole. Raises ApiError."""
        stream, options = body.get("stream"), body.get("stream_options")
        if stream is not None and not isinstance(stream, bool):
            raise ApiError(400, "stream must be true or false", "invalid_type", "stream")
        if options is not None and not isinstance(options, dict):
            raise ApiError(400, "stream_options must be an object", "invalid_type", "stream_options")
        if not stream:
            if options:
                raise ApiError(
                    400, "stream_options is for requests with stream: true", "invalid_value", "stream_options"
                )
            return None
        known = {"include_usage", "include_obfuscation"}
        for name, value in (options or {}).items():
            if name not in known or not isinstance(value, bool | None):
                raise ApiError(
                    400,
                    f"stream_options: {name[:64]!r} is not known, or neither true nor false",
                    "invalid_value",
                    "stream_options",
                )
        return cls(bool((options or {}).get("include_usage")))


@dataclass(frozen=True)
class Streamed:
    """What a pass added to one sample: ``text`` that will not change any more, and why it ended if it did. With
    log-probabilities, its new tokens and theirs."""

    sample: int
    text: str
    finish: str | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, TokenLogprob]] = field(default_factory=list)


class ChoiceStream:
    """One choice of a streamed answer. Log-probabilities of a token are told with the text that it is a part of: what
    may still become a stop string, or is a part of a character, waits with its tokens."""

    def __init__(self, bodies: ResponseBodies, prompt: list[int]) -> None:
        self._texts, self._known = bodies.texts, prompt
        self._text, self._told = "", 0
        self._waiting: list[Shown] = []
        self.begun = self.ended = False

    def logprobs_of(self, streamed: Streamed, call: Any) -> dict[str, Any] | None:
        """Of the tokens whose text is there now."""
        start = len(self._known)
        self._known += streamed.token_ids
        self._waiting += self._texts.shown(self._known, start, streamed.logprobs)
        count = len(self._waiting) if streamed.finish is not None else self._whole()
        ready, self._waiting = self._waiting[:count], self._waiting[count:]
        steps = placed(ready, self._text[self._told :], self._told)
        self._told += len(b"".join(chosen.text_bytes for chosen, _ in ready).decode("utf-8", "replace"))
        return shown_logprobs(steps, call) if steps else None

    def _whole(self) -> int:
        """How many of the tokens that wait make whole characters which are in the text."""
        count, pending = 0, b""
        left = len(self._text) - self._told
        for number, (chosen, _) in enumerate(self._waiting, 1):
            pending += chosen.text_bytes
            try:
                characters = len(pending.decode())
            except UnicodeDecodeError:
                continue
            if characters > left:
                break
            count = number
        return count

    def add(self, text: str) -> None:
        self._text += text


def event(value: Mapping[str, Any]) -> bytes:
    return (
        b"data: "
        + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")
        + b"\n\n"
    )


async def chunks(answer: Answer, bodies: ResponseBodies, replies: Any) -> AsyncIterator[bytes]:
    """The events of an answer, from its first to the last. Raises ApiError where nothing was sent yet; later it is an
    event."""
    reading, call = answer.reading, answer.reading.call
    options, chat, row = reading.stream, reading.call.url == CHAT, reading.row
    assert options is not None
    per_prompt = row.params.n
    choices = [ChoiceStream(bodies, list(each.token_ids)) for each in row.requests for _ in range(per_prompt)]
    begin = head(answer.id, answer.created, call, chunk=True)
    if options.include_usage:
        begin["usage"] = None

    def chunk(index: int, streamed: Streamed) -> bytes | None:
        choice, out = choices[index], b""
        text, logprobs = streamed.text, None
        if not choice.begun:
            choice.begun = True
            if chat:
                out += event({**begin, "choices": [_chat(index, {"role": "assistant", "content": ""}, None, None)]})
            elif call.echo:
                request = row.requests[index // per_prompt]
                out += event({**begin, "choices": [_text(index, bodies.texts.text_of(request.prompt), None, None)]})
        choice.add(text)
        if call.logprobs is not None:
            logprobs = choice.logprobs_of(streamed, call)
        if chat and (text or logprobs):
            out += event({**begin, "choices": [_chat(index, {"content": text}, logprobs, None)]})
        if streamed.finish is not None:
            choice.ended = True
            last = _chat(index, {}, None, streamed.finish) if chat else _text(index, text, logprobs, streamed.finish)
            out += event({**begin, "choices": [last]})
        elif not chat and (text or logprobs):
            out += event({**begin, "choices": [_text(index, text, logprobs, None)]})
        return out or None

    loop = asyncio.get_running_loop()
    async for number, found in answer.events():
        if isinstance(found, Completion):
            continue
        index = number * per_prompt + found.sample
        if choices[index].ended:
            continue
        make = partial(chunk, index, found)
        # Names of tokens are worked out in a thread; text alone costs nothing.
        data = await loop.run_in_executor(replies, make) if call.logprobs is not None else make()
        if data is not None:
            yield data
    if options.include_usage:
        completions = [each for each in answer.completions if each is not None]
        yield event({**begin, "choices": [], "usage": usage(completions)})
    yield DONE


def _chat(index: int, delta: dict[str, str], logprobs: Any, finish: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _text(index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
