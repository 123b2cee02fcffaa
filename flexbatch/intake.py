"""What a job is given, as requests: prompts encoded, each with its parameters and its samples; and their completions
put back together."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flexbatch.execution.batcher import Candidate
from flexbatch.execution.request_state import RequestState
from flexbatch.models.arch import Arch
from flexbatch.models.generation_config import GenerationDefaults
from flexbatch.planner.report import with_samples
from flexbatch.request import Completion, Request, SamplingParams
from flexbatch.text.decoder import TextDecoder
from flexbatch.text.detokenize import OutputText
from flexbatch.text.prompts import Prompt, PromptEncoder, as_prompts, plain_prompt
from flexbatch.validation.checks import short
from flexbatch.validation.errors import ConfigurationError

logger = logging.getLogger("flexbatch")

Item = tuple[Hashable, Prompt, SamplingParams | None]
"""Of a stream: the caller's key, a prompt, how to complete it (None: as the model's generation_config.json says)."""
Params = SamplingParams | Sequence[SamplingParams | None] | None
"""Of a job: for all prompts, or one each."""


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
        params = [
            defaults.instead_of(entry, f"sampling_params[{place}]") for place, entry in enumerate(sampling_params)
        ]
        if len(params) != len(prompts):
            raise ConfigurationError(
                f"{len(params)} sampling parameters for {len(prompts)} prompts; give one, or one each"
            )
    return [
        request
        for i, (prompt, p) in enumerate(zip(prompts, params, strict=True), first_index)
        for request in samples_of(i, prompt, p, encoder)
    ]


def not_params(value: Any) -> str:
    """What is wrong with a value that is given for SamplingParams."""
    remedy = "SamplingParams(**settings)" if isinstance(value, Mapping) else "SamplingParams(...)"
    return f"is {short(value)}, a {type(value).__name__}; give {remedy}"


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
                self._generation.source, ", ".join(missing),
            )  # fmt: skip
        return params


def samples_of(index: int, prompt: Prompt, params: SamplingParams, encoder: PromptEncoder) -> Iterator[Request]:
    """The n requests of one prompt, made as they are asked for, with a number for ``max_tokens``. Raises PromptError,
    at once."""
    encoder.check_params(index, params)
    token_ids = encoder.encode(index, prompt, params.max_tokens)
    limited = params.within(encoder.room(token_ids))
    text = plain_prompt(index, prompt).text
    return (Request(index, token_ids, limited, sample, text) for sample in range(limited.n))


def candidates_of(requests: Iterable[Request], tokenizer: Any, arch: Arch, engine_seed: int) -> Iterator[Candidate]:
    """Requests with the state that their sampling and their text need, one by one as they are asked for."""
    decoder = None if tokenizer is None else TextDecoder(tokenizer)
    for request in requests:
        output = OutputText(
            decoder,
            request.params,
            eos_token_ids=arch.eos_token_ids,
            prompt_token_ids=request.prompt_token_ids,
            max_context=arch.max_positions,
        )
        yield Candidate(RequestState(request, engine_seed, arch.eos_token_ids), output)


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

    def __init__(self, items: Iterable[Item], encoder: PromptEncoder, defaults: Defaults) -> None:
        self._items, self._encoder, self._defaults = items, encoder, defaults
        self._keys: dict[int, Hashable] = {}
        self._gathering = Gathering()
        self.failed: list[tuple[Hashable, Completion]] = []

    def requests(self) -> Iterator[Request]:
        for index, item in enumerate(self._items):
            if not isinstance(item, tuple | list) or len(item) != 3:
                raise ConfigurationError(
                    f"item {index} of the stream is {str(item)[:80]!r}; an item is (key, prompt, SamplingParams)"
                )
            key, prompt, params = item
            try:
                samples = samples_of(index, prompt, self._defaults.instead_of(params), self._encoder)
            except ValueError as error:
                self.failed.append((key, Completion([], finish_reason="error", error=str(error), index=index)))
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
