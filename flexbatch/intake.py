"""Requests that wait for the engine, and who gets their completions. Nothing here ever blocks a running block."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from typing import Any

from flexbatch.execution import sequence as execution
from flexbatch.execution.observer import RunObserver
from flexbatch.execution.pass_batch import PassBatch
from flexbatch.execution.scheduler import Scheduler
from flexbatch.models.arch import Arch
from flexbatch.models.generation_config import GenerationDefaults
from flexbatch.planner.report import described_failure
from flexbatch.request import Completion, Request, SamplingParams
from flexbatch.text.decoder import TextDecoder
from flexbatch.text.prompts import Prompt, PromptEncoder, as_prompts, plain_prompt
from flexbatch.validation.checks import short
from flexbatch.validation.errors import ConfigurationError, EngineBusyError

logger = logging.getLogger("flexbatch")

Item = tuple[Hashable, Prompt, SamplingParams | None]
"""An item of a stream: the caller's key, a prompt, and how to complete it (None: as generation_config.json says)."""
Params = SamplingParams | Sequence[SamplingParams | None] | None
"""The sampling parameters of a job: one for all prompts, or one each."""
OnText = Callable[[str], None]


class Defaults:
    """What holds for requests without sampling parameters, and one line in the log about what of it those with
    parameters do without."""

    def __init__(self, generation: GenerationDefaults) -> None:
        self._generation = generation
        self._told: set[tuple[str, ...]] = set()

    def instead_of(self, params: SamplingParams | None, what: str = "sampling_params") -> SamplingParams:
        """The parameters as given, the model's where there are none. Raises ConfigurationError for what is neither, or
        cannot be followed."""
        if params is None:
            return self._generation.params()
        if not isinstance(params, SamplingParams):
            raise ConfigurationError(f"{what} {not_params(params)}")
        missing = tuple(self._generation.left_out(params))
        if missing and missing not in self._told:
            self._told.add(missing)
            logger.warning(
                "%s: not applied, as the given SamplingParams leave it out: %s. "
                "LLM.get_default_sampling_params() has what the file says",
                self._generation.source,
                ", ".join(missing),
            )
        return params


def not_params(value: Any) -> str:
    """What is wrong with a value that is given for SamplingParams."""
    remedy = "SamplingParams(**settings)" if isinstance(value, Mapping) else "SamplingParams(...)"
    return f"is {short(value)}, a {type(value).__name__}; give {remedy}"


def requests_of(
    prompts: Prompt | Sequence[Prompt],
    sampling_params: Params,
    encoder: PromptEncoder,
    defaults: Defaults,
    first_index: int = 0,
) -> list[Request]:
    """One request for every sample of every prompt, in the order of the prompts, which are counted from
    ``first_index``. One SamplingParams is for all.

    Raises PromptError for the first prompt that cannot be run, ConfigurationError for prompts that are none, and when
    there are not as many parameters as prompts, or others than those.
    """
    prompts = as_prompts(prompts)
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        params = [defaults.instead_of(sampling_params)] * len(prompts)
    else:
        if isinstance(sampling_params, str | Mapping) or not isinstance(sampling_params, Iterable):
            raise ConfigurationError(
                f"sampling_params {not_params(sampling_params)}, or a list of them, one for each prompt"
            )
        params = [defaults.instead_of(entry, f"sampling_params[{i}]") for i, entry in enumerate(sampling_params)]
        if len(params) != len(prompts):
            raise ConfigurationError(
                f"{len(params)} sampling parameters for {len(prompts)} prompts; give one, or one each"
            )
    return [
        request
        for i, (prompt, p) in enumerate(zip(prompts, params, strict=True), first_index)
        for request in samples_of(i, prompt, p, encoder)
    ]


def samples_of(
    index: int, prompt: Prompt, params: SamplingParams, encoder: PromptEncoder, source: Hashable = None
) -> Iterator[Request]:
    """The n requests of one prompt, made as they are asked for, with a number for ``max_tokens``. Raises PromptError,
    at once."""
    encoder.check_params(index, params)
    token_ids = encoder.encode(index, prompt, params.max_tokens)
    limited = params.within(encoder.context_left(token_ids))
    text = plain_prompt(index, prompt).text
    return (Request(index, token_ids, limited, sample, text, source) for sample in range(limited.n))


def completion_of(sequence: execution.Sequence) -> Completion:
    """The completion of a sequence that ended, or of a request that failed."""
    request, output = sequence.request, sequence.output
    completion = Completion(
        list(request.prompt_token_ids),
        prompt=request.prompt,
        index=request.index,
        error=described_failure(sequence),
        finish_reason="error",
    )
    if output.finish is None or sequence.error:
        return completion
    completion.token_ids, completion.text = output.token_ids, output.text
    completion.finish_reason, completion.stop_reason = output.finish.reason, output.finish.stop_reason
    if request.params.logprobs is not None:
        completion.logprobs = sequence.logprobs
    if request.params.prompt_logprobs is not None:
        unscored = min(request.params.prompt_logprobs_start, len(request.prompt_token_ids))
        completion.prompt_logprobs = [*[None] * unscored, *sequence.prompt_logprobs]
    return completion


def with_samples(completions: Mapping[int, Completion]) -> Completion:
    """The first of the n completions of a prompt, with all of them as its samples when there are several; they end in
    any order. One that failed comes before the first, so that nobody takes the rest for the whole."""
    first = next((completions[sample] for sample in sorted(completions) if completions[sample].error), completions[0])
    if len(completions) > 1:
        first.samples = [completions[sample] for sample in sorted(completions)]
    return first


@dataclass
class Expected:
    """Who waits for the samples of one prompt."""

    key: Hashable
    num_samples: int
    on_text: OnText | None = None
    named: bool = False
    completions: dict[int, Completion] = field(default_factory=dict)


class Intake(RunObserver):
    """The line of waiting requests. New ones may be added at any time, from any thread; they become sequences when the
    scheduler has capacity for them."""

    def __init__(self, encoder: PromptEncoder, generation: GenerationDefaults, arch: Arch, engine_seed: int) -> None:
        self.encoder, self.defaults = encoder, Defaults(generation)
        self._decoder = None if encoder.tokenizer is None else TextDecoder(encoder.tokenizer)
        self._arch, self._engine_seed = arch, engine_seed
        self._waiting: deque[Request] = deque()
        self._expected: dict[int, Expected] = {}
        self._sequence_ids, self._indices = count(), count()
        self._named: dict[Hashable, int] = {}
        """Indices of the prompts that have an id, by it."""
        self._has_listeners = False

    def __len__(self) -> int:
        """Prompts that are not finished, waiting and running ones."""
        return len(self._expected)

    @property
    def num_waiting(self) -> int:
        """Requests that are not sequences yet."""
        return len(self._waiting)

    def check_empty(self, what: str) -> None:
        """Raises EngineBusyError while prompts are not finished. what: the call that needs the whole block."""
        if self._expected:
            raise EngineBusyError(
                f"{what} was called while {len(self)} requests of add_request are not finished; call step() until "
                "has_unfinished() is false, or abort them"
            )

    def add(
        self,
        key: Hashable,
        prompt: Prompt,
        params: SamplingParams | None,
        on_text: OnText | None,
        index: int,
        source: Hashable = None,
    ) -> None:
        """Encode a prompt and let it wait. Raises PromptError, ConfigurationError."""
        samples = list(samples_of(index, prompt, self.defaults.instead_of(params), self.encoder, source))
        self._has_listeners |= on_text is not None
        self._expected[index] = Expected(key, len(samples), on_text)
        self._waiting.extend(samples)

    def add_requests(self, samples: Iterable[Request]) -> None:
        """Let encoded requests wait; their completions go by the indices of their prompts."""
        for request in samples:
            self._expected.setdefault(request.index, Expected(request.index, request.params.n))
            self._waiting.append(request)

    def add_item(
        self, index: int, item: Any, on_tokens: Callable[[Hashable, str], None] | None
    ) -> tuple[Hashable, Completion] | None:
        """Let an item of a stream wait; returns its key and a completion that says why, where it cannot be run. Raises
        ConfigurationError for what is no item."""
        if not isinstance(item, tuple | list) or len(item) not in (3, 4) or not isinstance((*item, None)[3], Hashable):
            raise ConfigurationError(
                f"item {index} of the stream is {str(item)[:80]!r}; an item is (key, prompt, SamplingParams), or "
                "(key, prompt, SamplingParams, source) with a source that has a hash"
            )
        key, prompt, params, *source = item
        try:
            self.add(key, prompt, params, None if on_tokens is None else partial(on_tokens, key), index, *source)
        except ValueError as error:
            return key, Completion([], finish_reason="error", error=str(error), index=index)
        return None

    def add_named(
        self, key: Hashable, prompt: Prompt, params: SamplingParams | None, on_text: OnText | None
    ) -> Hashable:
        """Let a prompt wait under its own id; returns the id, a number where None is given. Raises
        ConfigurationError for an id that is in use."""
        # Without a seed, the random stream of a prompt belongs to its number.
        index = next(self._indices)
        key = index if key is None else key
        if key in self._named:
            raise ConfigurationError(f"request_id {key!r} belongs to a request that has not finished")
        self.add(key, prompt, params, on_text, index)
        self._named[key], self._expected[index].named = index, True
        return key

    def arrivals(self) -> Iterator[execution.Sequence | None]:
        """Sequences in the order of the requests, made as they are asked for; None while nobody waits. Never ends."""
        while True:
            try:
                request = self._waiting.popleft()
            except IndexError:
                yield None
                continue
            yield execution.Sequence(
                request,
                self._decoder,
                engine_seed=self._engine_seed,
                eos_token_ids=self._arch.eos_token_ids,
                max_context=self._arch.max_positions,
                sequence_id=next(self._sequence_ids),
            )

    def ahead(self, limit: int | None) -> list[Request]:
        """The first requests that wait; None: all."""
        return list(islice(self._waiting, limit))

    def deliver(self, completion: Completion, request: Request) -> tuple[Hashable, Completion] | None:
        """The key of a prompt and its first completion, with all of them as its samples, once the last has come."""
        expected = self._expected.get(request.index)
        if expected is None:
            return None
        expected.completions[request.sample] = completion
        if len(expected.completions) < expected.num_samples:
            return None
        del self._expected[request.index]
        if expected.named:
            del self._named[expected.key]
        return expected.key, with_samples(expected.completions)

    def drop(self, key: Hashable) -> set[int]:
        """Expect the prompt of an id no longer; returns its index, nothing where nobody waits for it."""
        index = self._named.pop(key, None)
        if index is None:
            return set()
        del self._expected[index]
        self._waiting = deque(request for request in self._waiting if request.index != index)
        return {index}

    def clear(self) -> None:
        self._waiting.clear()
        self._expected.clear()
        self._named.clear()

    def after_pass(self, scheduler: Scheduler, batch: PassBatch, seconds: float) -> None:
        """Hand on the new text of every prompt's first sample, where somebody listens."""
        if not self._has_listeners:
            return
        for sequence in [*scheduler.running.values(), *scheduler.finished]:
            expected = self._expected.get(sequence.request.index)
            if expected is not None and expected.on_text is not None and sequence.request.sample == 0:
                text = sequence.output.take()
                if text:
                    expected.on_text(text)

    def check(self) -> None:
        """Invariant: somebody expects every request that waits."""
        assert {request.index for request in self._waiting} <= self._expected.keys()
