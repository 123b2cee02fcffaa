"""What the host's work between passes takes by what comes and goes, found in passes that are composed and not run."""

from __future__ import annotations

import contextlib
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from flexbatch.calibrate import composing
from flexbatch.calibrate.passes import SmallJob, SmallModels, job_runner, resident, small_arch
from flexbatch.policy.limits import PAGE_TOKENS
from flexbatch.trace import Tracer

CPU = torch.device("cpu")


def test_turns_count_all_that_comes_and_goes() -> None:
    """Every request once, every token of a prompt, and every page that is taken while a sequence decodes, in several
    rounds in one runner; nothing is left in it."""
    policy = replace(resident(8, 1), prefill_chunk=40, prefill_budget=120)
    job = SmallJob(19, 40, 30)
    with torch.inference_mode(), job_runner(small_arch(1, 8), policy, CPU, Tracer(), job) as runner:
        for seed in range(2):
            turns = [turn for turn, seconds in composing.turns(runner, policy, replace(job, seed=seed)) if seconds > 0]
            assert sum(turn.requests for turn in turns) == pytest.approx(19)
            assert sum(turn.prompt_tokens for turn in turns) == pytest.approx(19 * 40)
            # Rows 40 to 68 are of tokens that decode: 48 and 64 begin a page.
            assert sum(turn.pages for turn in turns) == 19 * 2
            assert sum(turn.decoding for turn in turns) == 19 * 29
            assert max(turn.decoding for turn in turns) <= 8
            pool = runner.cache.pools["gpu"]
            assert pool.num_available == pool.num_pages
        runner.check()


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_costs_are_told_apart(noise: float) -> None:
    """By the turns of the jobs that are measured."""
    chance, timed = random.Random(5), []
    policy = replace(resident(composing.BLOCK, 1), prefill_chunk=512, prefill_budget=4096)
    longest = max(composing.JOBS, key=lambda job: job.prompt_tokens)
    with torch.inference_mode(), job_runner(small_arch(1, 8), policy, CPU, Tracer(), longest) as runner:
        for job in composing.JOBS:
            tokens = job.prompt_tokens
            reading = replace(policy, prefill_chunk=tokens, prefill_budget=composing.PASS_REQUESTS * tokens)
            for turn, _ in composing.turns(runner, reading, job):
                seconds = 2e-4 + 1e-6 * turn.decoding + 1e-4 * turn.requests + 2e-7 * turn.prompt_tokens
                timed.append((turn, (seconds + 6e-6 * turn.pages) * (1 + noise * chance.gauss(0, 1))))
    found = composing.fitted(timed)
    wanted = {"request": 1e-4, "prompt_token": 2e-7, "page": 6e-6}
    assert found == {name: pytest.approx(value, rel=0.01 + 8 * noise) for name, value in wanted.items()}


def test_costs_of_this_machine() -> None:
    """Finite, and not all nothing."""
    with contextlib.closing(SmallModels(CPU, 8)) as models:
        found = composing.composing_seconds(models)
    assert all(0 <= seconds < math.inf for seconds in found.values()) and sum(found.values()) > 0
    rates = {"pass_seconds": 1e-3, "sequence_seconds": 1e-6, "launch_seconds": 5e-4}
    with_them = composing.with_composing(rates, found)
    assert with_them["launch_seconds"] == 5e-4 and with_them["prompt_token_seconds"] == found["prompt_token"]
    assert with_them["request_seconds"] >= found["request"]
    assert with_them["sequence_seconds"] == pytest.approx(1e-6 + found["page"] / PAGE_TOKENS)


def test_prompts_of_another_seed_share_no_page() -> None:
    pages = Counter(
        tuple(request.prompt_token_ids[:PAGE_TOKENS])
        for seed in range(3)
        for request in SmallJob(64, seed=seed, prompt_tokens=16).requests
    )
    assert max(pages.values()) == 1
