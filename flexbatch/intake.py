"""Requests that wait for the engine, and who gets their completions. Nothing here ever blocks a running block."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count
from typing import Any

from flexbatch.execution import sequence as execution
from flexbatch.execution.masks import GrammarFollower
from flexbatch.execution.observer import RunObserver
from flexbatch.execution.pass_batch import PassBatch
from flexbatch.execution.requests import Defaults, Params, hashable_id, requests_of, samples_of
from flexbatch.execution.scheduler import Scheduler
from flexbatch.execution.waiting import WaitingLine
from flexbatch.execution.watch import OnPass, first_text
from flexbatch.models.arch import Arch
from flexbatch.models.generation_config import GenerationDefaults
from flexbatch.planner.adapter_choice import AdapterChoice
from flexbatch.planner.completions import completion_of, with_samples
from flexbatch.request import Completion, Request, SamplingParams
from flexbatch.text.chat import ChatOptions
from flexbatch.text.decoder import TextDecoder
from flexbatch.text.prompts import Prompt, PromptEncoder, as_prompts, with_chat_options
from flexbatch.validation.errors import ConfigurationError, EngineBusyError

Item = tuple[Hashable, Prompt, SamplingParams | None]
"""An item of a stream: the caller's key, a prompt, and how to complete it (None: as generation_config.json says)."""


@dataclass
class Expected:
    """Who waits for the samples of one prompt."""

    key: Hashable
    num_samples: int
    on_pass: OnPass | None = None
    named: bool = False
    completions: dict[int, Completion] = field(default_factory=dict)


class Intake(RunObserver):
    """The line of waiting requests. New ones may be added at any time, from any thread, also while a pass runs; they
    become sequences when the scheduler has capacity for them."""

    def __init__(
        self,
        encoder: PromptEncoder,
        generation: GenerationDefaults,
        arch: Arch,
        engine_seed: int,
        loras: AdapterChoice,
        line: WaitingLine,
    ) -> None:
        self.encoder, self.defaults, self._loras = encoder, Defaults(generation), loras
        self._decoder = None if encoder.tokenizer is None else TextDecoder(encoder.tokenizer)
        self._arch, self._engine_seed = arch, engine_seed
        self._waiting = line
        self._lock = threading.RLock()
        """Held while the containers change together, and never while a prompt is encoded."""
        self._expected: dict[int, Expected] = {}
        self._sequence_ids, self._indices = count(), count()
        self._next_number = 0
        """Of the next prompt among all that the engine has had: the random stream of one without a seed belongs to it,
        so that the same prompts, asked again, draw other tokens."""
        self._named: dict[Hashable, int] = {}
        """Indices of the prompts that have an id, by it."""
        self._has_listeners = False

    def __len__(self) -> int:
        """Prompts that are not finished, waiting and running ones."""
        return len(self._expected)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def check_empty(self, what: str) -> None:
        """Raises EngineBusyError while prompts are not finished. what: the call that needs the whole block."""
        if self._expected:
            raise EngineBusyError(
                f"{what} was called while {len(self)} requests of add_request are not finished; call step() until "
                "has_unfinished() is false, or abort them"
            )

    def take_numbers(self, prompts: int) -> int:
        """The first of the numbers that so many prompts have."""
        first, self._next_number = self._next_number, self._next_number + prompts
        return first

    def requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params,
        first_index: int | None = None,
        chat: ChatOptions | None = None,
        lora: Any = None,
    ) -> list[Request]:
        """The requests of a job. ``chat``: for its prompts, which are all chat messages then. ``first_index``: of its
        first prompt in a larger job, whose numbers its prompts have; None: they have the next ones of this engine."""
        prompts = as_prompts(prompts)
        if chat is not None and chat.given():
            prompts = with_chat_options(prompts, chat)
        number = self.take_numbers(len(prompts)) if first_index is None else first_index
        self._next_number = max(self._next_number, number + len(prompts))
        adapters = self._loras.numbers(lora, len(prompts))
        return requests_of(prompts, params, self.encoder, self.defaults, first_index or 0, number, adapters)

    def add(
        self,
        key: Hashable,
        prompt: Prompt,
        params: SamplingParams | None,
        on_pass: OnPass | None,
        index: int,
        source: Hashable = None,
        named: bool = False,
        lora: Any = None,
        priority: int = 0,
    ) -> None:
        """Encode a prompt and let it wait. ``named``: under an id. Raises PromptError, ConfigurationError,
        CheckpointError."""
        number, adapter, params = self.take_numbers(1), self._loras.number(lora), self.defaults.instead_of(params)
        samples = list(samples_of(index, prompt, params, self.encoder, number, source, adapter, priority))
        self._has_listeners |= on_pass is not None
        with self._lock:
            self._expected[index] = Expected(key, len(samples), on_pass, named)
            self._waiting.add(samples)

    def add_requests(self, samples: Iterable[Request]) -> None:
        """Let encoded requests wait; their completions go by the numbers of their prompts, as text."""
        for request in samples:
            key = str(request.index if request.number is None else request.number)
            self._expected.setdefault(request.index, Expected(key, request.params.n))
            self._waiting.add([request])

    def add_item(
        self, index: int, item: Any, on_tokens: Callable[[Hashable, str], None] | None
    ) -> tuple[Hashable, Completion] | None:
        """Let an item of a stream wait; returns its key and a completion that says why, where it cannot be run. Raises
        ConfigurationError for what is no item."""
        whole = isinstance(item, tuple | list) and 3 <= len(item) <= 5
        if not whole or not isinstance((*item, None)[3], Hashable):
            raise ConfigurationError(
                f"item {index} of the stream is {str(item)[:80]!r}; an item is (key, prompt, SamplingParams), or "
                "(key, prompt, SamplingParams, source, LoRARequest or None) with a source that has a hash"
            )
        key, prompt, params, *more = item
        try:
            on_pass = None if on_tokens is None else first_text(partial(on_tokens, key))
            self.add(key, prompt, params, on_pass, index, **dict(zip(("source", "lora"), more, strict=False)))
        except ValueError as error:
            return key, Completion([], finish_reason="error", error=str(error), index=index, request_id=key)
        return None

    def add_named(
        self, key: Hashable, prompt: Prompt, params: SamplingParams | None, on_pass: OnPass | None, **more: Any
    ) -> Hashable:
        """Let a prompt wait under its id, for None a number; returns it. ``more``: as `add` takes it. Raises
        ConfigurationError for an id in use."""
        index = next(self._indices)
        if key is None:
            key = next(number for number in chain([index], self._indices) if number not in self._named)
        elif hashable_id(key) in self._named:
            raise ConfigurationError(f"request_id {key!r} belongs to a request that has not finished")
        self._named[key] = index  # first, as the pass that ends it may begin as soon as it waits
        try:
            self.add(key, prompt, params, on_pass, index, named=True, **more)
        except BaseException:
            self._named.pop(key, None)
            raise
        return key

    def arrivals(self) -> Iterator[execution.Sequence | None]:
        """Sequences in the order of the requests, made as they are asked for; None while nobody waits. Never ends."""
        while True:
            with self._lock:
                request = self._waiting.pop()
            if request is None:
                yield None
                continue
            grammar = self.grammar_of(request.params)
            yield execution.Sequence(
                request,
                self._decoder if grammar is None else self.encoder.grammars.decoder,
                engine_seed=self._engine_seed,
                eos_token_ids=self._arch.eos_token_ids,
                max_context=self._arch.context,
                sequence_id=next(self._sequence_ids),
                grammar=grammar,
            )

    def overtakes(self, first: execution.Sequence) -> bool:
        """Whether somebody waits who is more urgent than a sequence."""
        with self._lock:
            return (priority := self._waiting.priority) is not None and priority < first.request.priority

    def grammar_of(self, params: SamplingParams) -> GrammarFollower | None:
        """The grammar of one answer. It ends by EOS, and by those of its stop tokens that are no text."""
        if params.structured_outputs is None:
            return None
        grammar = self.encoder.grammars.compile(params.structured_outputs)
        ends = () if params.ignore_eos else self._arch.eos_token_ids
        return GrammarFollower(grammar, {*ends, *grammar.vocabulary.special.keys() & {*params.stop_token_ids}})

    def ahead(self, limit: int | None) -> list[Request]:
        """The first requests that wait; None: all. Of several engines, those that this one may expect to get."""
        with self._lock:
            return self._waiting.ahead(limit)

    def completion_of(self, sequence: execution.Sequence) -> Completion:
        return completion_of(sequence, self._decoder if sequence.request.params.detokenize else None)

    def deliver(self, completion: Completion, request: Request) -> tuple[Hashable, Completion] | None:
        """The key of a prompt and its first completion, with all of them as its samples, once the last has come."""
        self._waiting.done(request.index, request.sample)
        expected = self._expected.get(request.index)
        if expected is None:
            return None
        completion.request_id = expected.key
        expected.completions[request.sample] = completion
        if len(expected.completions) < expected.num_samples:
            return None
        del self._expected[request.index]
        if expected.named:
            self._named.pop(expected.key, None)
        return expected.key, with_samples(expected.completions)

    def gather(
        self,
        run: Generator[tuple[Request, Completion], None, None],
        on_finished: Callable[[Completion], None] | None = None,
        on_prompt: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """The completions of a job that runs, in the order of its prompts; each is told of as it ends, and each
        prompt, with all of its samples, when the last of them does."""
        results: dict[int, Completion] = {}
        # Closed with the run, however that ends: its error would keep it alive, and the pages of its sequences.
        with contextlib.closing(run) as completions:
            for request, completion in completions:
                whole = self.deliver(completion, request)
                if on_finished is not None:
                    on_finished(completion)
                if whole is not None:
                    results[request.index] = whole[1]
                    if on_prompt is not None:
                        on_prompt(request.index, whole[1])
        return [results[index] for index in sorted(results)]

    def drop(self, key: Hashable) -> set[int]:
        """Expect the prompt of an id no longer; returns its index, nothing where nobody waits for it."""
        index = self._named.pop(hashable_id(key), None)
        if index is None:
            return set()
        with self._lock:
            self._expected.pop(index, None)
            self._waiting.keep(lambda request: request.index != index)
        return {index}

    def drop_all_but(self, begun: set[int]) -> set[int]:
        """Expect no more prompts than these, by their indices, and those of which a sample has ended; returns all."""
        with self._lock:
            begun = begun | self._waiting.away()
            kept = {index for index, each in self._expected.items() if index in begun or each.completions}
            self._expected = {index: each for index, each in self._expected.items() if index in kept}
            self._named = {key: index for key, index in self._named.items() if index in kept}
            self._waiting.keep(lambda request: request.index in kept)
            return kept

    def clear(self) -> None:
        with self._lock:
            self._waiting.clear()
            self._expected.clear()
            self._named.clear()

    def after_pass(self, scheduler: Scheduler, batch: PassBatch, seconds: float) -> None:
        """Show every sequence that may have new tokens to whoever listens to its prompt."""
        if not self._has_listeners:
            return
        for sequence in [*scheduler.running.values(), *scheduler.finished]:
            expected = self._expected.get(sequence.request.index)
            if expected is not None and expected.on_pass is not None:
                expected.on_pass(sequence)

    def check(self) -> None:
        """Invariant: somebody expects every request that waits."""
        self._waiting.check()
        assert {request.index for request in self._waiting} <= self._expected.keys()
