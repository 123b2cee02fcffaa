"""Prompts that begin alike: the common pages are prefilled once per tier, and the tokens are those of a run that
shares nothing."""

from __future__ import annotations

import pytest

from flexbatch import LLM, SamplingParams
from flexbatch.memory.kvcache import KVCache
from flexbatch.policy.limits import PAGE_TOKENS
from tests.tiny_models import make_model, random_prompts

HEADER, NUM_PROMPTS = 300, 100
SHARED = HEADER // PAGE_TOKENS * PAGE_TOKENS
"""Whole pages alone can be shared: 288 tokens."""
PLACEMENTS = {"gpu": ((100, 0, 100, 0, 100, 0), 1), "mixed": ((40, 30, 40, 30, 50, 50), 3)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    make_model("opt-tiny", folder)
    return folder


def prompts() -> list[list[int]]:
    """100 different ends, of 1 to 9 tokens, after one header."""
    (header,) = random_prompts([HEADER], seed=1)
    return [header + end for end in random_prompts([1 + place % 9 for place in range(NUM_PROMPTS)], seed=2)]


def run(model, placement, tmp_path, params, **settings):
    """Tokens of every sample, and the report."""
    percent, tiers = PLACEMENTS[placement]
    memory = {"gpu_memory": "1GiB", "cpu_memory": "1GiB", "offload_dir": str(tmp_path)}
    with LLM(
        str(model), device="cpu", percent=percent, gpu_batch_size=25, num_gpu_batches=2, **{**memory, **settings}
    ) as llm:
        completions = llm.generate(prompts(), params)
        llm.runner.check()
        return (
            [[sample.token_ids for sample in completion.samples or [completion]] for completion in completions],
            llm.report(),
            tiers,
        )


def prefilled(num_samples: int) -> int:
    """Prompt tokens that one tier has to read: the header, every prompt's end, and for further samples what does not
    fill a page of the prompt."""
    ends = sum(len(prompt) - SHARED for prompt in prompts())
    rests = sum(len(prompt) - (len(prompt) - 1) // PAGE_TOKENS * PAGE_TOKENS for prompt in prompts())
    return SHARED + ends + (num_samples - 1) * rests


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_header_is_prefilled_once_on_every_tier(placement, num_samples, model, tmp_path, monkeypatch):
    params = SamplingParams(max_tokens=4, temperature=0 if num_samples == 1 else 0.9, n=num_samples, ignore_eos=True)
    shared, report, tiers = run(model, placement, tmp_path, params)
    unshared = num_samples * sum(map(len, prompts()))
    assert report["prompt_tokens"] == unshared
    if num_samples == 1 or tiers == 1:
        assert report["prefilled_tokens"] == prefilled(num_samples) + (tiers - 1) * SHARED
    else:  # samples of a prompt may be on different tiers, and then share the header alone
        ends = num_samples * sum(len(prompt) - SHARED for prompt in prompts())
        assert (
            prefilled(num_samples) + (tiers - 1) * SHARED
            <= report["prefilled_tokens"]
            <= tiers * SHARED + ends
            < 0.07 * unshared
        )
    monkeypatch.setattr(KVCache, "shareable", lambda *arguments: [])
    alone, report, _ = run(model, placement, tmp_path, params)
    assert report["prefilled_tokens"] == unshared
    assert shared == alone
    if num_samples > 1:
        assert any(samples[0] != samples[1] for samples in shared), (
            "samples of one prompt have random streams of their own"
        )


@pytest.mark.parametrize("chunk", [7, 512])
def test_a_compressed_header_gives_the_tokens_of_its_own_reading(chunk, model, tmp_path, monkeypatch):
    """Others read the header quantized, as the one that brought it does."""
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    shared, report, tiers = run(model, "mixed", tmp_path, params, cache_bits=4, prefill_chunk=chunk)
    assert report["prefilled_tokens"] == prefilled(1) + (tiers - 1) * SHARED
    monkeypatch.setattr(KVCache, "shareable", lambda *arguments: [])
    assert shared == run(model, "mixed", tmp_path, params, cache_bits=4, prefill_chunk=chunk)[0]
