"""Prompts and sampling parameters, as a caller gives them, to requests."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from flexbatch.models.generation_config import GenerationDefaults
from flexbatch.request import Request, SamplingParams
from flexbatch.text.prompts import Prompt, PromptEncoder, as_prompts
from flexbatch.validation.checks import short
from flexbatch.validation.errors import ConfigurationError

logger = logging.getLogger("flexbatch")

Params = SamplingParams | Sequence[SamplingParams | None] | None
"""The sampling parameters of a job: one for all prompts, or one each."""


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


def hashable_id(key: Any) -> Hashable:
    """The id of a request. Raises ConfigurationError for what can be none, such as a list of ids."""
    try:
        hash(key)
    except TypeError:
        raise ConfigurationError(
            f"request_id {short(key)} is a {type(key).__name__} without a hash; an id is one text, number or tuple of "
            "these, and a call is about one request"
        ) from None
    return key


def requests_of(
    prompts: Prompt | Sequence[Prompt],
    sampling_params: Params,
    encoder: PromptEncoder,
    defaults: Defaults,
    first_index: int = 0,
    first_number: int | None = None,
    adapters: Sequence[int] | None = None,
) -> list[Request]:
    """One request for every sample of every prompt, in the order of the prompts, which are counted from
    ``first_index``. One SamplingParams is for all. ``first_number``: of the random streams; None: the same.
    ``adapters``: their numbers, 0 for none.

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
    number = first_index if first_number is None else first_number
    return [
        request
        for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))
        for request in samples_of(
            first_index + i, prompt, p, encoder, number + i, adapter=adapters[i] if adapters else 0
        )
    ]


def samples_of(
    index: int,
    prompt: Prompt,
    params: SamplingParams,
    encoder: PromptEncoder,
    number: int | None = None,
    source: Hashable = None,
    adapter: int = 0,
    priority: int = 0,
) -> Iterator[Request]:
    """The n requests of one prompt, made as they are asked for, with a number for ``max_tokens``, and bad words as
    tokens. Raises PromptError, or ConfigurationError for parameters that contradict each other, at once."""
    params.check()
    encoder.check_params(index, params)
    found = encoder.read(index, prompt, params.max_tokens, params.truncate_prompt_tokens)
    limited = encoder.with_tokens(index, params).within(encoder.context_left(found.token_ids))
    made = partial(Request, index, found.token_ids, limited, prompt=found.text, number=number, source=source)
    return (made(sample=sample, adapter=adapter, priority=priority) for sample in range(limited.n))
