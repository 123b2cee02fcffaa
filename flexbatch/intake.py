"""What a job is given, as requests: prompts encoded, each with its parameters and its samples; and their completions put back together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, cast

from flexbatch.config import ConfigurationError
from flexbatch.detokenize import OutputText
from flexbatch.execution.batcher import Candidate
from flexbatch.execution.request_state import RequestState
from flexbatch.models.arch import Arch
from flexbatch.prompts import Prompt, PromptEncoder
from flexbatch.reports import with_samples
from flexbatch.request import Completion, Request, SamplingParams

Item = tuple[Hashable, Prompt, SamplingParams]
"""Of a stream: the caller's key, a prompt, how to complete it."""


def requests_of(prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None, encoder: PromptEncoder) -> list[Request]:
    """One request for every sample of every prompt, in the order of the prompts. One SamplingParams is for all.

    Raises PromptError for the first prompt that cannot be run, ConfigurationError when there are not as many parameters as prompts.
    """
    parts = prompts if isinstance(prompts, str) else list(prompts)
    prompts = cast("list[Prompt]", [parts] if is_prompt(parts) else parts)
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        params = [sampling_params or SamplingParams()] * len(prompts)
    else:
        params = list(sampling_params)
        if len(params) != len(prompts):
            raise ConfigurationError(f"{len(params)} sampling parameters for {len(prompts)} prompts; give one, or one each")
    return [request for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)) for request in samples_of(i, prompt, p, encoder)]


def is_prompt(parts: str | Sequence[Any]) -> bool:
    """Whether it is one prompt (text, token ids, chat messages) and not a sequence of them."""
    return isinstance(parts, str) or (len(parts) > 0 and all(isinstance(part, Integral | Mapping) for part in parts))


def samples_of(index: int, prompt: Prompt, params: SamplingParams, encoder: PromptEncoder) -> Iterator[Request]:
    """The n requests of one prompt, made as they are asked for. Raises PromptError, at once."""
    encoder.check_params(index, params)
    token_ids = encoder.encode(index, prompt, params.max_tokens)
    text = prompt if isinstance(prompt, str) else None
    return (Request(index, token_ids, params, sample, text) for sample in range(params.n))


def candidates_of(requests: Iterable[Request], tokenizer: Any, arch: Arch, engine_seed: int) -> Iterator[Candidate]:
    """Requests with the state that their sampling and their text need, one by one as they are asked for."""
    for request in requests:
        prompt_tokens = len(request.prompt_token_ids)
        output = OutputText(tokenizer, request.params, eos_token_ids=arch.eos_token_ids, prompt_tokens=prompt_tokens, max_context=arch.max_positions)
        yield Candidate(RequestState(request, engine_seed), output)


class Gathering:
    """Completions by prompt, until all samples of one are there."""

    def __init__(self) -> None:
        self._pending: dict[int, dict[int, Completion]] = {}

    def add(self, request: Request, completion: Completion) -> Completion | None:
        """The prompt's first completion, with all of them as its samples, once the last has come."""
        found = self._pending.setdefault(request.index, {})
        found[request.sample] = completion
        if len(found) < request.params.n:
            return None
        return with_samples(self._pending.pop(request.index))


class Intake:
    """The items of a stream as requests, encoded one by one as they are asked for, and who gets the completions.

    ``failed`` collects the items that cannot be run, as completions that say why.
    """

    def __init__(self, items: Iterable[Item], encoder: PromptEncoder) -> None:
        self._items, self._encoder = items, encoder
        self._keys: dict[int, Hashable] = {}
        self._gathering = Gathering()
        self.failed: list[tuple[Hashable, Completion]] = []

    def requests(self) -> Iterator[Request]:
        for index, (key, prompt, params) in enumerate(self._items):
            try:
                samples = samples_of(index, prompt, params, self._encoder)
            except ValueError as error:
                self.failed.append((key, Completion((), finish_reason="error", error=str(error), index=index)))
                continue
            self._keys[index] = key
            yield from samples

    def key(self, index: int) -> Hashable:
        """Of item number ``index``, while it runs."""
        return self._keys[index]

    def finished(self, request: Request, completion: Completion) -> Iterator[tuple[Hashable, Completion]]:
        """What can be handed out now: items that failed meanwhile, and this one if its last sample has come."""
        yield from self.take_failed()
        whole = self._gathering.add(request, completion)
        if whole is not None:
            yield self._keys.pop(request.index), whole

    def take_failed(self) -> list[tuple[Hashable, Completion]]:
        failed, self.failed = self.failed, []
        return failed
