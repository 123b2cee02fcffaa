"""One search is enough: what the optimizer counts is what the engine needs."""

from __future__ import annotations

import numpy as np
import pytest

from flexbatch import LLM
from flexbatch.config import EngineConfig
from flexbatch.execution.block_sizes import block_sizes, cache_layout
from flexbatch.execution.job import Job
from flexbatch.memory.weight_plan import plan_weights
from flexbatch.models import shapes
from flexbatch.planner import choose as choosing
from flexbatch.planner.problem import model_shape, workload_of
from flexbatch.planner.requirements import block_requirements
from flexbatch.policy.blocks import coarse
from flexbatch.policy.footprint import peak_memory
from flexbatch.policy.hardware import load_hardware
from flexbatch.policy.limits import weight_group
from flexbatch.policy.policy import TIERS, Policy, Split

ON_GPU, ON_CPU = Split(1, 0), Split(0, 1)
MIB = 2**20


def ragged(count: int, mean: int, answer: int) -> Job:
    """Prompts of lognormal lengths: the longest are many times the mean."""
    generator = np.random.default_rng(5)
    prompts = np.clip(generator.lognormal(np.log(mean), 0.6, count), 8, 2000).astype(int)
    answers = generator.integers(answer // 4, answer, count)
    return Job(tuple((prompts + answers - 1).tolist()), tuple(prompts.tolist()))


@pytest.mark.parametrize(
    "model, weights, cache, batch, count, bits",
    [
        ("llama-3-8b", Split(0.5, 0.5), ON_CPU, 64, 1, (16, 16)),
        ("opt-30b", Split(0.19, 0.80, 0.01), ON_CPU, 41, 2, (16, 4)),
        ("opt-30b", Split(0.2, 0.8), Split(0, 0.85, 0.15), 41, 2, (16, 4)),
        ("mixtral-8x7b", Split(0.18, 0.81, 0.01), Split(0, 0.74, 0.26), 26, 3, (16, 16)),
        ("llama-3.2-1b", Split(0.6, 0.4), Split(0.4, 0.6), 90, 2, (8, 8)),
        ("opt-6.7b", Split(0.01, 0.99), Split(0.3, 0.3, 0.4), 30, 2, (4, 16)),
    ],
    ids=str,
)
def test_the_optimizer_counts_what_the_engine_needs(model, weights, cache, batch, count, bits):
    """No tier gets more than what was counted for it by half a per cent of all, and no more than that is counted."""
    job, arch, hardware = ragged(3000, 400, 64), shapes.shape(model), load_hardware("h100")
    policy = Policy(weights, cache, ON_GPU, batch, count, *bits, prefill_chunk=512, prefill_budget=1024)
    import torch

    layout = cache_layout(arch, policy.cache_bits, torch.bfloat16)
    plan = plan_weights(
        arch, weights, policy.weight_bits, weight_group(arch.hidden_size), 2, num_slabs=policy.num_weight_slabs
    )
    rows = block_requirements(plan, policy, layout, block_sizes(policy, layout, job), torch.bfloat16, cuda=True)
    exact = {tier: sum(row.num_bytes for row in rows if row.tier == tier) for tier in TIERS}
    machine = choosing.without_reserves(hardware)
    counted = peak_memory(model_shape(model, arch, 2, policy.weight_bits), machine, workload_of(job), policy)
    whole = sum(exact.values())
    for tier in TIERS:
        assert sum(counted[tier].values()) == pytest.approx(exact[tier], abs=0.005 * whole), tier


def test_a_long_job_is_searched_for_once(monkeypatch):
    """A job of many rows whose longest are far from the mean took four searches, and 8 seconds of processor time."""
    plans = []

    def counting(*arguments):
        plans.append(real(*arguments))
        return plans[-1]

    real = choosing.choose
    monkeypatch.setattr(choosing, "choose", counting)
    config = EngineConfig(
        model="llama-3-8b", hardware="h100", gpu_memory="10GiB", cpu_memory="24GiB", dummy_weights=True
    )
    plan = LLM.plan(config, ragged(100_000, 300, 128))["plan"]
    assert len(plans) == 1 and plans[0].linear_programs < 300
    assert not plan.missing


def test_budgets_are_coarse_and_hold_what_was_asked_for():
    for budget in [*range(1, 300), 511.5, 1000, 4097, 70_001, 44_544]:
        found = coarse(budget)
        assert budget <= found <= 1.04 * budget + 1, budget
        assert coarse(found) == found
    assert len({coarse(budget) for budget in range(4096, 8192)}) <= 33
