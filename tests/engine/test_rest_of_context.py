"""``max_tokens=None`` is the rest of the model's context, everywhere where a number of tokens counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexbatch import LLM, SamplingParams
from flexbatch.execution.job import Job
from flexbatch.request import Request
from flexbatch.text.detokenize import OutputText


@pytest.mark.parametrize(
    ("wanted", "room", "tokens"), [(None, 9, 9), (None, 0, 0), (None, -1, 0), (4, 9, 4), (16, 9, 9), (0, 9, 0)]
)
def test_tokens_within_the_context(wanted: int | None, room: int, tokens: int) -> None:
    params = SamplingParams(max_tokens=wanted, temperature=0.5, stop="x")
    assert params.tokens_within(room) == tokens
    resolved = params.within(room)
    assert resolved.max_tokens == (tokens if wanted is None else wanted) and resolved.stop == ("x",)
    output = OutputText(None, replace(params, stop=()), prompt_token_ids=[5] * (100 - room), max_context=100)
    assert output.max_tokens == tokens


@pytest.mark.parametrize(("least", "room", "kept"), [(0, 9, 0), (5, 9, 5), (9, 9, 9), (50, 9, 9), (50, 0, 0)])
def test_the_least_number_of_tokens_ends_with_the_context_too(least: int, room: int, kept: int) -> None:
    resolved = SamplingParams(max_tokens=None, min_tokens=least, stop="x").within(room)
    assert (resolved.min_tokens, resolved.max_tokens, resolved.stop) == (kept, room, ("x",))


def test_without_a_context_there_is_no_rest_of_it() -> None:
    with pytest.raises(ValueError, match="needs max_context"):
        OutputText(None, SamplingParams(max_tokens=None))


def test_generation_goes_to_the_end_of_the_context_and_the_plan_counts_it() -> None:
    """Prompts just below the context, so that the rest is short; `generate`, `stream`, several samples, and beside
    requests with a limit.
    """
    with LLM("demo", device="cpu", gpu_batch_size=4, num_gpu_batches=1) as llm:
        context = llm.arch.max_positions
        prompts = [[5 + i] * (context - rest) for i, rest in enumerate((1, 4, 9))]
        rest = SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)
        jobs: list[Job] = []
        prepare = llm._capacity.prepare

        def watched(job: Job):  # type: ignore[no-untyped-def]
            jobs.append(job)
            return prepare(job)

        llm._capacity.prepare = watched  # type: ignore[method-assign]
        found = llm.generate(prompts, rest)
        assert [(len(one.token_ids), one.finish_reason) for one in found] == [
            (1, "length"),
            (4, "length"),
            (9, "length"),
        ]
        assert jobs[-1] == Job((context - 1,) + (context - 1,) * 2, tuple(map(len, prompts)))
        named = llm.generate(
            prompts, [SamplingParams(max_tokens=len(one.token_ids), temperature=0, ignore_eos=True) for one in found]
        )
        assert [one.token_ids for one in named] == [one.token_ids for one in found]
        mixed = [
            (0, prompts[1], rest),
            (1, prompts[1], SamplingParams(max_tokens=2, temperature=0)),
            (2, [7] * (context + 5), rest),
        ]
        streamed = dict(llm.stream(mixed))
        assert (
            streamed[0].token_ids == found[1].token_ids
            and len(streamed[1].token_ids) <= 2
            and "context" in streamed[2].error
        )
        two = llm.generate([prompts[1]], SamplingParams(max_tokens=None, n=2, seed=1, ignore_eos=True))[0]
        assert [len(sample.token_ids) for sample in two.samples] == [4, 4]


def test_requests_of_the_engine_have_a_number() -> None:
    from flexbatch.execution.requests import samples_of
    from flexbatch.text.prompts import PromptEncoder

    encoder = PromptEncoder(None, max_context=10, vocab_size=50)
    (request,) = samples_of(0, [1, 2, 3], SamplingParams(max_tokens=None), encoder)
    assert isinstance(request, Request) and request.params.max_tokens == 7
