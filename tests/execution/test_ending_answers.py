"""Answers of the reservation benchmark end where they are told to, with passes one by one and ahead."""

from __future__ import annotations

import random

import pytest

from benchmark.reservation import EndingLLM, geometric, run_job


@pytest.mark.parametrize("ahead", [False, True])
def test_answers_have_the_lengths_that_they_are_to_have(ahead: bool) -> None:
    """`run_job` refuses others. Some reach max_tokens, and some would go on."""
    chance, most = random.Random(1), 12
    settings = {"percent": (100, 0, 100, 0, 100, 0), "gpu_batch_size": 6, "num_gpu_batches": 1}
    memory = {"gpu_memory": "64MiB", "cpu_memory": "64MiB", "device": "cpu", "hardware": "cpu"}
    with EndingLLM("demo", async_scheduling=ahead, **settings, **memory) as llm:
        vocabulary = llm.arch.vocab_size
        llm.loop.stop_token = vocabulary - 1
        answers = [geometric(chance, 6, most) for _ in range(16)] + [most + 1] * 3
        prompts = [[chance.randrange(10, vocabulary - 2) for _ in range(10 + i)] for i in range(len(answers))]
        found = run_job(llm, prompts, answers, most)
    assert found["tokens"] == sum(min(answer, most) for answer in answers)
