"""Every family through the engine: greedy tokens and log-probabilities equal those of transformers, at placements
that take turns from case to case."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flexbatch import LLM, SamplingParams
from tests.tiny_models import FAMILY_CASES, make_model, random_prompts

NEW_TOKENS = 10
# weights, cache and activations on GPU and CPU in per cent; micro-batches; prompt tokens of a chunk
PLACEMENTS = [
    ((30, 40, 40, 30, 50, 50), 2, 7),
    ((0, 100, 0, 100, 100, 0), 1, 64),
    ((0, 0, 100, 0, 0, 100), 3, 16),
    ((100, 0, 0, 0, 100, 0), 2, 33),
]
SAMPLED = list({kind: case for case, (kind, _) in reversed(FAMILY_CASES.items())}.values())[::2]
"""One case of every second family: whatever sets the layers of the others apart, `test_parity.py` shows by default."""
TURNS = [(case, PLACEMENTS[i % len(PLACEMENTS)]) for i, case in enumerate(FAMILY_CASES)]
GRID = [(case, placement) for case in FAMILY_CASES for placement in PLACEMENTS if (case, placement) not in TURNS]


@torch.no_grad()
def check(case, placement, folder):
    """Greedy tokens of every prompt, and of every other one the log-probabilities of all its tokens, read and
    generated."""
    percent, micro_batches, chunk = placement
    model = make_model(case, folder)
    prompts = random_prompts([1, 5, 33, 300 if "alibi" in case else 90], seed=3)
    plain = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    scored = replace(plain, logprobs=0, prompt_logprobs=0)
    settings = {
        "percent": percent,
        "gpu_batch_size": 2,
        "num_gpu_batches": micro_batches,
        "prefill_chunk": chunk,
        "gpu_memory": "1GiB",
        "cpu_memory": "1GiB",
    }
    with LLM(str(folder), device="cpu", offload_dir=str(folder / "offload"), **settings) as llm:
        completions = llm.generate(prompts, [plain, scored, plain, scored])
    for prompt, completion in zip(prompts, completions, strict=True):
        wanted = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
        assert completion.token_ids == wanted[0, len(prompt) :].tolist()
        if completion.logprobs is not None:
            found = [
                entry[token].logprob
                for token, entry in zip(
                    wanted[0, 1:].tolist(), [*completion.prompt_logprobs[1:], *completion.logprobs], strict=True
                )
            ]
            expected = model(wanted).logits[0, :-1].log_softmax(-1).gather(1, wanted[0, 1:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("case", "placement"),
    [pytest.param(*turn, marks=() if turn[0] in SAMPLED else pytest.mark.slow) for turn in TURNS],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value[0])),
)
def test_tokens_equal_generate(case, placement, tmp_path):
    check(case, placement, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "placement"), GRID, ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value[0]))
)
def test_tokens_equal_generate_at_every_placement(case, placement, tmp_path):
    check(case, placement, tmp_path)
