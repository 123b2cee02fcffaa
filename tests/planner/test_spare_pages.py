"""Pages beyond those of the sequences that a block is planned for."""

from __future__ import annotations

import random

import pytest

from flexbatch.config import EngineConfig
from flexbatch.execution.job import Job
from flexbatch.planner.planner import Planner
from flexbatch.planner.spare_pages import of_chance, with_spare_pages
from flexbatch.policy.limits import PAGE_TOKENS


def ragged(count: int, seed: int) -> Job:
    chance = random.Random(seed)
    prompts = tuple(chance.randint(192, 256) for _ in range(count))
    return Job(tuple(tokens + 16 for tokens in prompts), prompts)


@pytest.mark.parametrize("seed", range(20))
def test_any_half_of_a_job_fits_one_of_two_engines(seed: int) -> None:
    """127 requests: each engine is planned for every second one, and gets any 64 of them, as it has free slots."""
    job = ragged(127, seed)
    part = job.of_every(2)
    room = sum(of_chance(part, 69).cache_tokens)
    for draw in range(50):
        got = random.Random(draw).sample(job.cache_tokens, 64)
        assert sum(got) <= room
    assert room <= 1.07 * sum(part.cache_tokens), "a few per cent are enough"
    equal = Job((80,) * 64, (64,) * 64)
    assert of_chance(equal, 69) == equal


@pytest.mark.parametrize("engines", [1, 2])
def test_the_budgets_give_room_for_it(engines: int) -> None:
    part = ragged(127, seed=1).of_every(2)
    settings = {"model": "opt-1.3b", "hardware": "cpu", "device": "cpu", "dummy_weights": True}
    # The engine of a rank has its number of engines in its settings; a dry run opens none of them.
    plan = Planner(EngineConfig(**settings, gpu_memory="8GiB", cpu_memory="8GiB"), part, dry=True).engine_plan
    object.__setattr__(plan.config, "data_parallel_size", engines)
    sizes = plan.sizes(part)
    found = with_spare_pages(plan, sizes, part)
    pages, more = (sum(each.cache.pages(tier) for tier in ("gpu", "cpu", "disk")) for each in (sizes, found))
    assert more == pages if engines == 1 else pages < more <= pages + 64 * 8 // PAGE_TOKENS + 64
