"""Blocks of another size in the middle of a job, once the lengths of its answers are known."""

from __future__ import annotations

import dataclasses
import random

import pytest

from flexbatch.config import EngineConfig
from flexbatch.execution.job import Job
from flexbatch.planner import learned
from flexbatch.planner import planner as planning
from flexbatch.planner.learned import GROWTHS, of_size
from flexbatch.planner.placements import overshoot
from flexbatch.planner.planner import Planner
from flexbatch.planner.spare_pages import with_spare_pages
from flexbatch.policy import candidates
from tests.execution.test_answer_lengths import MOST, geometric

FIXED = {"percent": (100, 0, 100, 0, 100, 0), "num_gpu_batches": 1, "prefill_chunk": 32, "cpu_attention": 0.0}


def planned(**settings) -> Planner:
    """For answers that may reach ``MOST``, in memory for a few of them."""
    budgets = {"gpu_memory": "40MiB", "cpu_memory": "16MiB", "dtype": "float32", "device": "cpu", "hardware": "cpu"}
    config = EngineConfig(model="demo", **{**budgets, **FIXED, **settings})
    return Planner(config, Job.of([(32, MOST)] * 300, 2048), dry=True)


def learned_job(mean: float) -> Job:
    chance = random.Random(1)
    return Job.of([(32, MOST)] * 268, 2048, [min(MOST, geometric(chance, mean)) for _ in range(268)])


@pytest.fixture
def searches(monkeypatch):
    """Jobs that a placement was searched for."""
    found, choose = [], planning.choose_policy

    def counted(problem, *arguments):
        found.append(problem.job)
        return choose(problem, *arguments)

    monkeypatch.setattr(planning, "choose_policy", counted)
    return found


def test_a_block_is_made_larger_without_a_search_where_little_is_left(searches):
    """Two searches in the middle of a job took as long as the larger block then saved."""
    planner = planned()
    before, planner.search_seconds = planner.engine_plan, 10.0
    assert len(searches) == 1 and before.policy.gpu_batch_size < 12
    job = learned_job(120)
    found = planner.adopt_lengths(job, pass_seconds=0.01)
    assert len(searches) == 1 and found is planner.engine_plan
    assert found.policy.gpu_batch_size > 3 * before.policy.gpu_batch_size
    assert not overshoot(found.requirements(found.sizes(job)), planner.deployment.budgets)
    assert found.weight_plan is before.weight_plan
    one_more = planner.requirements_of(of_size(found.policy, found.policy.gpu_batch_size + 8, False), job)
    assert overshoot(one_more, planner.deployment.budgets)
    # By about the same lengths nothing changes any more.
    assert planner.adopt_lengths(learned_job(125), pass_seconds=0.01) is None and len(searches) == 1
    # On the GPU only the number of sequences is open: also where passes take a minute it is found without a search.
    planner.adopt_lengths(learned_job(40), pass_seconds=60.0)
    assert len(searches) == 1


def test_a_block_grows_in_the_pages_that_it_has():
    """Made anew for every estimate of what is left of a job, it read sequences anew four times, and recorded graphs."""
    planner = planned()
    assert planner.engine_plan.most == 0
    first = planner.adopt_lengths(learned_job(250), pass_seconds=0.01)
    largest, sizes = first.made_for, first.sizes(learned_job(250))
    assert first.most == GROWTHS[0] * first.policy.gpu_batch_size
    assert sizes.max_micro_batch_tokens == largest.gpu_batch_size + first.policy.prompt_tokens_per_micro_batch
    held = with_spare_pages(first, sizes, learned_job(250)).cache
    job = learned_job(100)
    second = planner.adopt_lengths(job, 0.01, held)
    assert second.made_for == largest and first.policy.gpu_batch_size < second.policy.gpu_batch_size <= first.most
    assert held.covers(second.sizes(job).cache)
    needs = second.requirements(dataclasses.replace(second.sizes(job), cache=held))
    assert not overshoot(needs, planner.deployment.budgets)
    # Many more than it has room for have to gain something.
    third = planner.adopt_lengths(learned_job(8), 0.01, held)
    assert third is None or third.made_for == largest or third.policy.gpu_batch_size > second.policy.gpu_batch_size


def test_a_block_grows_once_it_is_known_that_few_answers_are_long():
    """Means as before, while long answers that had not ended were taken to reach their limit: sequences in flight are
    expected to have a third fewer tokens."""
    planner = planned()
    early, later = [20] * 200 + [MOST] * 68, [150 + i for i in range(268)]
    assert learned_rows(early) > 1.4 * learned_rows(later)
    early_job, later_job = (Job.of([(32, MOST)] * 268, 2048, answers) for answers in (early, later))
    assert abs(later_job.mean_tokens / early_job.mean_tokens - 1) < 0.09
    first = planner.adopt_lengths(early_job, pass_seconds=0.01)
    held = with_spare_pages(first, first.sizes(early_job), early_job).cache
    assert planner.adopt_lengths(later_job, 0.01) is None, "another block has to promise more"
    second = planner.adopt_lengths(later_job, 0.01, held)
    assert second.made_for == first.made_for and second.policy.gpu_batch_size > 1.3 * first.policy.gpu_batch_size
    assert planner.adopt_lengths(later_job, 0.01, held) is None
    assert planner.adopt_lengths(early_job, 0.01, held) is None


def learned_rows(answers: list[int]) -> int:
    return Job.of([(32, MOST)] * len(answers), 2048, answers).rows_to_reserve(8, 1.0)[-1]


def test_a_placement_is_searched_for_where_passes_are_long(searches):
    planner = planned(percent=(100, 0, 0, 100, 100, 0), cpu_memory="40MiB")
    # A second for answers of which nothing was known is ten for likely ones.
    planner.search_seconds = 1.0
    planner.adopt_lengths(learned_job(120), pass_seconds=0.1)
    assert len(searches) == 1
    planner = planned(percent=(100, 0, 0, 100, 100, 0), cpu_memory="40MiB")
    planner.search_seconds = 1.0
    planner.adopt_lengths(learned_job(120), pass_seconds=10.0)
    assert len(searches) == 3


def test_nobody_waits_for_a_walk_that_estimates_pages_anew_in_every_pass(searches, monkeypatch):
    walked, passes_of = [], candidates.passes_of

    def counted(workload, policy, exact=True, **options):
        walked.append(exact)
        return passes_of(workload, policy, exact, **options)

    planner = planned()
    monkeypatch.setattr(candidates, "passes_of", counted)
    assert planner.adopt_lengths(learned_job(120), pass_seconds=0.01) is not None
    assert walked and not any(walked)


def test_a_block_that_the_user_fixed_in_part_is_searched_for_only_where_that_may_pay(searches):
    planner = planned(gpu_batch_size=4, num_gpu_batches=None)
    planner.search_seconds = 10.0
    assert planner.adopt_lengths(learned_job(120), pass_seconds=1e-4) is None and len(searches) == 1
    planner.adopt_lengths(learned_job(120), pass_seconds=10.0)
    assert len(searches) == 2


def test_buffers_for_more_sequences_take_little_of_the_cache(monkeypatch):
    """Of a small model in little memory they took half of it."""
    planner, job = planned(), learned_job(120)
    problem, before = planner._problem(job), planner.engine_plan
    grows = learned.resized(problem, before, job)
    assert grows.most > grows.policy.gpu_batch_size
    monkeypatch.setattr(learned, "GROWTH_COST", -1.0)
    plain = learned.resized(problem, before, job)
    assert plain.most == 0 and plain.policy.gpu_batch_size >= grows.policy.gpu_batch_size
