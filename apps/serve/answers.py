"""Requests of those who wait for an answer: read, encoded and run like a line of a batch file, and answered whole or as
the text comes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
import threading
import time
from collections.abc import AsyncIterator, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from flexbatch.apps.jobs.openai_reader import check_model, with_prompts
from flexbatch.apps.jobs.openai_requests import CHAT, Call, RequestError, parse_body
from flexbatch.apps.jobs.openai_responses import ResponseBodies, problem_of
from flexbatch.apps.jobs.plan import make_encode
from flexbatch.apps.jobs.prompts import RowError
from flexbatch.apps.jobs.rows import RowRequest
from flexbatch.apps.serve.bodies import json_object
from flexbatch.apps.serve.errors import ApiError, engine_failed, stopping
from flexbatch.apps.serve.serving import ENGINE_FAILED, Asked, Serving
from flexbatch.apps.serve.streaming import Streamed, StreamOptions
from flexbatch.execution.sequence import Sequence
from flexbatch.request import Completion, SamplingParams

INTAKE_THREADS = 1
"""Threads that read and encode requests, beside the engine's and the event loop's: a tokenizer is no friend of two."""


@dataclass(frozen=True)
class Names:
    """What requests may call the model: its own name, and those of its adapters."""

    model: str
    adapters: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        return self.model, *self.adapters


@dataclass(frozen=True)
class ReadRequest:
    """A request as it was read: ``row`` has its prompts, encoded."""

    row: RowRequest
    stream: StreamOptions | None

    @property
    def call(self) -> Call:
        call: Call = self.row.extra
        return call

    @property
    def sequences(self) -> int:
        return sum(request.params.n for request in self.row.requests)


class Answers:
    """Takes in the requests of one server. ``max_waiting``: sequences that may wait or run for them at one time."""

    def __init__(self, serving: Serving, defaults: SamplingParams, names: Names, max_waiting: int) -> None:
        self.serving, self.names, self.max_waiting = serving, names, max_waiting
        self._defaults = defaults
        self._encode = make_encode(serving.llm, None)
        self.bodies = ResponseBodies(serving.llm.tokenizer)
        self.intake = ThreadPoolExecutor(INTAKE_THREADS, "intake")
        self.replies = ThreadPoolExecutor(1, "replies")
        self._lock = threading.Lock()
        self.num_waiting = self._num_entering = 0
        """Sequences of requests that are not answered yet."""

    def close(self) -> None:
        self.intake.shutdown(wait=False, cancel_futures=True)
        self.replies.shutdown(wait=False, cancel_futures=True)

    def read(self, data: bytes, url: str) -> ReadRequest:
        """A request from its body; called in a thread of `intake`. Raises ApiError."""
        body = json_object(data)
        stream = StreamOptions.of(body)
        try:
            call, prompts, params = parse_body(
                {name: value for name, value in body.items() if name not in ("stream", "stream_options")},
                Call(url=url),
                self._defaults,
            )
            check_model(call, self.names.all)
            call = dataclasses.replace(call, model=call.model or self.names.model)
            lora = call.model if call.model in self.names.adapters else None
            if stream is not None and call.echo and params.logprobs is not None:
                raise RequestError("unsupported_parameter", "echo with logprobs is not streamed: leave one of them out")
            row = with_prompts(
                RowRequest(0, 0, 0, extra=call, lora=lora), prompts, params, lambda _: secrets.randbits(63)
            )
            encoded = [self._encode(request) for request in row.requests]
        except RequestError as error:
            raise ApiError(404 if error.code == "model_not_found" else 400, str(error), error.code) from None
        except RowError as error:
            raise ApiError(400, _bare(str(error)), "invalid_value") from None
        return ReadRequest(dataclasses.replace(encoded[0], others=encoded[1:]), stream)

    @contextlib.contextmanager
    def entering(self) -> Iterator[None]:
        """For the time in which a request is read. Raises ApiError where too many wait or are read already."""
        with self._lock:
            if self.num_waiting + self._num_entering >= self.max_waiting:
                raise self._busy()
            self._num_entering += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_entering -= 1

    def begin(self, reading: ReadRequest) -> Answer:
        """Let a request run. Raises ApiError where too many wait."""
        count = reading.sequences
        if count > self.max_waiting:
            raise ApiError(
                400,
                f"the request asks for {count:,} answers, more than the {self.max_waiting:,} of all",
                "too_many_answers",
            )
        with self._lock:
            if self.num_waiting + count > self.max_waiting:
                raise self._busy()
            self.num_waiting += count
        return Answer(self, reading)

    def leave(self, reading: ReadRequest) -> None:
        with self._lock:
            self.num_waiting -= reading.sequences

    def _busy(self) -> ApiError:
        """When to ask again is a guess: some answers end within a few passes."""
        told = f"{self.num_waiting:,} answers are waited for, of {self.max_waiting:,} at most; ask again later"
        return ApiError(
            429, told, "rate_limit_exceeded", retry_after=min(60, 10 * self.serving.load.look().pass_seconds)
        )

    def check(self) -> None:
        """Invariant: nobody is counted twice, or forgotten."""
        assert 0 <= self.num_waiting <= self.max_waiting, self.num_waiting


class Answer:
    """One request that runs. It belongs to the event loop that made it; the engine's thread puts in what comes."""

    def __init__(self, answers: Answers, reading: ReadRequest) -> None:
        self._answers, self.reading = answers, reading
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self.completions: list[Completion | None] = [None] * len(reading.row.requests)
        self._missing, self._left = len(self.completions), False
        self._told: dict[tuple[int, int], int] = {}
        """Tokens whose log-probabilities were put in, by prompt and sample; the engine's thread's."""
        self.began = time.monotonic()
        chat = reading.call.url == CHAT
        self.id, self.created = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}", int(time.time())
        self._keys: list[Hashable] = answers.serving.ask(
            Asked(
                request,
                partial(self._put, number),
                None if reading.stream is None else partial(self._grown, number),
            )
            for number, request in enumerate(reading.row.requests)
        )

    # The engine's thread

    def _put(self, number: int, event: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))
        except RuntimeError:  # the loop is closed: the server has stopped
            return

    def _grown(self, number: int, sequence: Sequence) -> None:
        """Take what is new of a sequence; it changes with the next pass."""
        text, sample = sequence.output.take(), sequence.request.sample
        finish = None if sequence.output.finish is None or sequence.error else sequence.output.finish.reason
        told = self._told.get((number, sample), 0)
        logprobs = sequence.logprobs[told:]
        tokens = sequence.token_ids[sequence.num_prompt_tokens + told :][: len(logprobs)]
        self._told[number, sample] = told + len(logprobs)
        if text or logprobs or finish is not None:
            self._put(number, Streamed(sample, text, finish, tokens, logprobs))

    # The event loop

    async def events(self) -> AsyncIterator[tuple[int, Any]]:
        """(number of the prompt, `Streamed` or `Completion`) as they come, until every prompt has its completion.
        Raises ApiError for a request that fails."""
        while self._missing:
            number, event = await self._events.get()
            if isinstance(event, Completion):
                self.completions[number] = event
                self._missing -= 1
                if event.finish_reason == "error":
                    raise self._problem()
            yield number, event

    async def whole(self) -> dict[str, Any]:
        """The body of the response. Raises ApiError."""
        async for _ in self.events():
            pass
        completions = [each for each in self.completions if each is not None]
        make = partial(self._answers.bodies.body, self.id, self.created, self.reading.row, completions)
        return await self._loop.run_in_executor(self._answers.replies, make)

    def _problem(self) -> ApiError:
        known = [each or Completion([]) for each in self.completions]
        problem = problem_of(self.reading.row, known)
        if problem.endswith(ENGINE_FAILED):
            return stopping() if self._answers.serving.stopping.is_set() else engine_failed()
        return ApiError(400, _bare(problem), "invalid_value")

    def leave(self) -> None:
        """Nobody waits for it any more: what still runs of it gives its pages back."""
        if not self._left:
            self._left = True
            self._answers.leave(self.reading)
            if self._missing:
                self._answers.serving.cancel(self._keys)


def _bare(message: str) -> str:
    """A message without the number that a prompt has in the engine."""
    return Completion([], error=message).bare_error
