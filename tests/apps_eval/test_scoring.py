"""Scoring prompts on the engine: the last token is predicted and never read, so that a prompt may be one token
longer than the context."""

from __future__ import annotations

import pytest
import torch
from oracle import OracleLLM, make_model

from flexbatch import LLM, SamplingParams

PARAMS = SamplingParams(max_tokens=0, prompt_logprobs=2)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("short"), positions=40))


@pytest.mark.parametrize("chunk", [5, 512])
def test_scored_continuations_share_the_pages_of_their_context(tiny, chunk):
    """42 continuations of one context of 200 tokens, two of them long and equal: the context is read once, all that
    is asked for is scored."""
    draw = torch.Generator().manual_seed(5)
    context = torch.randint(2, 300, (200,), generator=draw).tolist()
    prompts = [context + torch.randint(2, 300, (1 + position % 4,), generator=draw).tolist() for position in range(40)]
    prompts += [context + context[:50]] * 2
    params = [
        SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_start=200 - position % 3)
        for position in range(42)
    ]
    with LLM(str(tiny), device="cpu", dtype="float32", gpu_batch_size=4, num_gpu_batches=2, prefill_chunk=chunk) as llm:
        found = llm.generate(prompts, params)
        assert llm.statistics.prefilled_tokens < 0.3 * sum(map(len, prompts))
    for mine, theirs, asked in zip(found, OracleLLM(tiny).generate(prompts, PARAMS), params, strict=True):
        start = asked.prompt_logprobs_start
        assert mine.prompt_logprobs[:start] == [None] * start and len(mine.prompt_logprobs) == len(
            theirs.prompt_logprobs
        )
        for token, row, expected in zip(
            mine.prompt_token_ids[start:], mine.prompt_logprobs[start:], theirs.prompt_logprobs[start:], strict=True
        ):
            assert (
                row[token].logprob == pytest.approx(expected[token].logprob, abs=1e-4)
                and row[token].rank == expected[token].rank
            )


@pytest.mark.parametrize("chunk", [3, 64])
def test_prompt_logprobs_equal_transformers_up_to_one_token_past_the_context(short, chunk):
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 300, (length,), generator=draw).tolist() for length in (1, 2, 3, 4, 17, 39, 40, 41)]
    with LLM(short, device="cpu", dtype="float32", gpu_batch_size=2, num_gpu_batches=2, prefill_chunk=chunk) as llm:
        found = llm.generate(prompts, PARAMS)
        assert llm.statistics.prefilled_tokens == sum(max(1, len(prompt) - 1) for prompt in prompts)
        refused = dict(llm.stream([("long", [5] * 42, PARAMS), ("fine", [5] * 41, PARAMS)]))
    assert (
        refused["long"].finish_reason == "error"
        and "has 42 tokens" in refused["long"].error
        and refused["fine"].finish_reason == "length"
    )
    for mine, theirs in zip(found, OracleLLM(short).generate(prompts, PARAMS), strict=True):
        assert mine.token_ids == [] and mine.finish_reason == "length"
        assert len(mine.prompt_logprobs) == len(theirs.prompt_logprobs) and mine.prompt_logprobs[0] is None
        for row, expected in zip(mine.prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True):
            assert row.keys() == expected.keys()
            for token, entry in expected.items():
                assert row[token].logprob == pytest.approx(entry.logprob, abs=1e-4)
                assert row[token].rank == entry.rank
