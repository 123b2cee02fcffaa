"""Simple placements: the user's settings, everything on the GPU, each kind of tensor on one tier."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

from flexbatch.memory.tiers import MemoryRequirement
from flexbatch.planner.problem import Problem, constraints_of
from flexbatch.policy.limits import MAX_PREFILL_CHUNK, PAGE_TOKENS
from flexbatch.policy.policy import Policy, Split

WHOLE_BLOCK = 1024
"""Sequences of a block that is chosen without a search, at most: GEMMs are efficient from there on."""
LARGE_BUDGETS = (32768, 16384)
"""Prompt tokens of a micro-batch in a pass that are tried first for a large job that is on a GPU whole. The passes in
which its prompts are read are as many as those in which, at the end, ever fewer sequences decode: 1,000 prompts of
Llama-3-8B have 7 of them instead of 23 of 155."""
RESIDENT_BUDGETS = (4096, 2048, 1024)
"""Prompt tokens of a micro-batch in a pass that are tried where more do not fit beside a job that is on the GPU."""
SMALLEST_PREFILL_BUDGET = 32
"""Prompt tokens of a micro-batch in a pass where memory is so short that no more fit."""
ON_GPU, ON_CPU, ON_DISK = Split(1, 0), Split(0, 1), Split(0, 0, 1)
FALLBACK_PLACEMENTS = (
    (ON_GPU, ON_GPU),
    (ON_CPU, ON_GPU),
    (ON_CPU, ON_CPU),
    (ON_DISK, ON_GPU),
    (ON_DISK, ON_CPU),
    (ON_DISK, ON_DISK),
)
"""Placements of weights and cache that are tried with exact sizes when the optimizer, whose sizes are a little
larger, finds none."""
Requirements = Callable[[Policy], list[MemoryRequirement]]
"""The engine's exact requirements under a policy."""


def baseline_policy(
    problem: Problem, placement: tuple[Split, Split] = (ON_GPU, ON_GPU), most_sequences: int = WHOLE_BLOCK
) -> Policy:
    """The user's settings; where they say nothing, ``placement`` of weights and cache, one micro-batch and the block
    as large as the job."""
    config, job, percent = problem.config, problem.job, problem.percent
    weights, cache = placement
    activations = ON_GPU
    if config.percent is not None:
        weights, cache, activations = (
            Split.from_percent(config.percent[2 * kind], config.percent[2 * kind + 1]) for kind in range(3)
        )
    if problem.loaded is not None:
        weights = problem.loaded.weights
    assert percent is None or len(percent) == 6
    sequences = whole_waves(job.num_requests, most_sequences)
    batch = config.gpu_batch_size or -(-sequences // (config.num_gpu_batches or 1))
    constraints = constraints_of(problem, problem.budgets)
    return Policy(
        weights=weights,
        cache=cache,
        activations=activations,
        gpu_batch_size=batch,
        num_gpu_batches=config.num_gpu_batches or -(-sequences // batch),
        weight_bits=max(constraints.weight_bits),
        cache_bits=max(constraints.cache_bits),
        cpu_attention=config.cpu_attention or 0.0,
        cpu_experts=problem.cpu_experts or 0.0,
        prefill_chunk=config.prefill_chunk
        or min(MAX_PREFILL_CHUNK, -(-job.longest_prompt // PAGE_TOKENS) * PAGE_TOKENS),
        overlap=config.overlap,
        async_scheduling=constraints.async_scheduling,
        piece_tokens=config.piece_tokens,
        prefill_budget=config.prefill_budget or 0,
    )


def whole_waves(total: int, most: int) -> int:
    """Sequences of a block that takes a job in as few waves as ``most`` does, all of them alike: a last wave of a few
    sequences would take as many passes as the others."""
    waves = -(-max(1, total) // most)
    return -(-max(1, total) // waves)


def overshoot(rows: Iterable[MemoryRequirement], budgets: dict[str, int], share: float = 1.0) -> dict[str, int]:
    """Bytes by which the requirements of each tier exceed ``share`` of its budget; empty when all fit."""
    totals = dict.fromkeys(budgets, 0)
    for row in rows:
        totals[row.tier] += row.num_bytes
    return {
        tier: math.ceil(total - share * budgets[tier])
        for tier, total in totals.items()
        if total > share * budgets[tier]
    }


def resident(problem: Problem, baseline: Policy, device: str) -> Iterator[Policy]:
    """Policies with everything on the gpu tier and the whole block there, as far as the user leaves that open; ever
    fewer prompt tokens a pass, down to what keeps matrices efficient. The most on a "cuda" device, for jobs that are
    larger than one of which nothing is known: who streams waits for a pass."""
    if problem.config.percent is not None or any(
        split.gpu < 1 for split in (baseline.weights, baseline.cache, baseline.activations)
    ):
        return
    chosen, job = problem.config.prefill_budget is None, problem.job
    if chosen and device == "cuda" and job.num_requests > job.TYPICAL_REQUESTS:
        prompts = min(sum(job.prompt_tokens), baseline.prompt_tokens_per_micro_batch)
        for budget in LARGE_BUDGETS:
            if budget < prompts:
                yield dataclasses.replace(baseline, prefill_budget=budget)
    yield baseline
    if chosen:
        for budget in RESIDENT_BUDGETS:
            yield dataclasses.replace(baseline, prefill_budget=max(budget, baseline.prefill_chunk))


def fits_in_memory(problem: Problem, requirements: Requirements) -> bool:
    """Whether weights and the cache of a block that holds the job fit the gpu and the cpu tier together."""
    if problem.config.percent is not None:
        return False
    policy = baseline_policy(problem, (ON_CPU, ON_CPU))
    rows = requirements(dataclasses.replace(policy, prefill_budget=max(SMALLEST_PREFILL_BUDGET, policy.prefill_chunk)))
    needed = sum(row.num_bytes for row in rows if row.tier != "disk")
    return needed <= problem.budgets["gpu"] + problem.budgets["cpu"]


def fallbacks(problem: Problem, requirements: Requirements) -> Iterator[Policy]:
    """Simple placements that fit, each with its largest block, and with few prompt tokens a pass where more do not
    fit."""
    for placement in FALLBACK_PLACEMENTS[: 1 if problem.config.percent is not None else None]:
        for policy in smaller_blocks(problem, placement):
            if not overshoot(requirements(policy), problem.budgets):
                yield policy
                break


def smaller_blocks(problem: Problem, placement: tuple[Split, Split]) -> Iterator[Policy]:
    """Ever smaller blocks of one placement."""
    config = problem.config
    # A block that the user fixed has no other way to fit, and reading prompts in several passes may be most of a job.
    large = RESIDENT_BUDGETS if None not in (config.gpu_batch_size, config.num_gpu_batches) else ()
    for budget in [config.prefill_budget] if config.prefill_budget else [*large, 512, SMALLEST_PREFILL_BUDGET]:
        sequences = min(WHOLE_BLOCK, problem.job.num_requests)
        while sequences:
            policy = baseline_policy(problem, placement, sequences)
            yield dataclasses.replace(policy, prefill_budget=min(budget, policy.gpu_batch_size * policy.prefill_chunk))
            # Halves rounded up: 50 of 101 would leave one for a third wave.
            sequences = -(-sequences // 2) if sequences > 1 else 0
