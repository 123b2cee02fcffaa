"""Scoring prompts on the engine: the last token is predicted and never read, so that a prompt may be one token longer than the context."""

from __future__ import annotations

import pytest
import torch
from oracle import OracleLLM, make_model

from flexbatch import LLM, SamplingParams

PARAMS = SamplingParams(max_tokens=0, prompt_logprobs=2)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("short"), positions=40))


@pytest.mark.parametrize("chunk", [3, 64])
def test_prompt_logprobs_equal_transformers_up_to_one_token_past_the_context(short, chunk):
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 300, (length,), generator=draw).tolist() for length in (1, 2, 3, 4, 17, 39, 40, 41)]
    with LLM(short, device="cpu", dtype="float32", gpu_batch_size=2, num_gpu_batches=2, prefill_chunk=chunk) as llm:
        found = llm.generate(prompts, PARAMS)
        assert llm.statistics.prefilled_tokens == sum(max(1, len(prompt) - 1) for prompt in prompts)
        refused = dict(llm.stream([("long", [5] * 42, PARAMS), ("fine", [5] * 41, PARAMS)]))
    assert refused["long"].finish_reason == "error" and "has 42 tokens" in refused["long"].error and refused["fine"].finish_reason == "length"
    for mine, theirs in zip(found, OracleLLM(short).generate(prompts, PARAMS), strict=True):
        assert mine.token_ids == [] and mine.finish_reason == "length"
        assert len(mine.prompt_logprobs) == len(theirs.prompt_logprobs) and mine.prompt_logprobs[0] is None
        for row, expected in zip(mine.prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True):
            assert row.keys() == expected.keys()
            for token, entry in expected.items():
                assert row[token].logprob == pytest.approx(entry.logprob, abs=1e-4)
                assert row[token].rank == entry.rank
