"""From model, settings and job to a policy: the optimizer's sizes and rates on one side, the engine's exact sizes on
the other."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from flexbatch.execution.job import Job
from flexbatch.memory.tiers import MemoryRequirement, check_budgets
from flexbatch.planner.problem import Problem, constraints_of
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.limits import MAX_MICRO_BATCH_TOKENS, MAX_PREFILL_CHUNK, PAGE_TOKENS
from flexbatch.policy.optimizer import choose
from flexbatch.policy.plan import DoesNotFit, Plan, price
from flexbatch.policy.policy import Policy, Split
from flexbatch.validation.errors import DoesNotFitError

logger = logging.getLogger("flexbatch")

NO_SEARCH_SHARE = 0.25
"""Share of every budget below which a job needs no search: whatever is chosen, nothing has to travel."""
WHOLE_BLOCK = 1024
"""Sequences of a block that is chosen without a search, at most: GEMMs are efficient from there on."""
SMALLEST_PREFILL_BUDGET = 32
"""Prompt tokens of a micro-batch in a pass where memory is so short that no more fit."""
ROUNDING = 0.05
"""Share of a budget that whole tensors, sequences and pages may exceed a plan by."""
KEPT_BLOCK_SHARE = 0.97
"""The share of its predicted throughput that a block must keep when it is placed again in a little less memory.
A block of 70 sequences that was kept at any price went to disk with 9 % of its cache, and from 250 to 101 tokens a
second."""
LENGTH_TOLERANCE = 0.25
"""Relative difference of mean lengths from which another job is decided for again."""
ROUNDS = 12
"""Choices that may follow each other with less capacity, until the exact sizes fit."""
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


@dataclass(frozen=True)
class Choice:
    """A policy that fits by exact sizes, and its plan where the optimizer priced it."""

    policy: Policy
    plan: Plan | None


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
        prefill_chunk=config.prefill_chunk
        or min(MAX_PREFILL_CHUNK, -(-job.longest_prompt // PAGE_TOKENS) * PAGE_TOKENS),
        overlap=config.overlap,
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


def choose_policy(problem: Problem, hardware: Callable[[], Hardware], requirements: Requirements) -> Choice:
    """The policy of the user's settings, the rest of it chosen; it fits by the engine's exact ``requirements``.

    ``hardware`` is called only when something has to be weighed. A job far below all budgets is not searched for:
    everything is where the user wants it, or on the gpu tier. Raises DoesNotFitError with a table of what is
    missing.
    """
    baseline = baseline_policy(problem)
    if not overshoot(requirements(baseline), problem.budgets, NO_SEARCH_SHARE):
        return Choice(baseline, None)
    machine = without_reserves(hardware())
    if problem.is_fixed:
        # Refused by the caller with the exact table when it does not fit.
        return Choice(baseline, priced(problem, machine, baseline))
    logger.info("planning where everything goes, for %s sequences", f"{problem.job.num_requests:,}")
    simple = [priced(problem, machine, policy) for policy in fallbacks(problem, requirements)]
    found = [Choice(plan.policy, plan) for plan in simple]
    refusal = None
    try:
        found.append(searched(problem, machine, requirements))
    except DoesNotFit as error:
        refusal = error
    if not found:
        if problem.config.percent is not None:
            smallest = baseline_policy(problem, most_sequences=1)
            check_budgets(
                requirements(
                    dataclasses.replace(smallest, prefill_budget=smallest.prefill_budget or SMALLEST_PREFILL_BUDGET)
                ),
                problem.budgets,
            )
        raise DoesNotFitError(str(refusal)) from refusal
    return max(found, key=predicted)


def searched(problem: Problem, hardware: Hardware, requirements: Requirements) -> Choice:
    """Returns the optimizer's choice. While exact sizes exceed a budget, it chooses again with less capacity. Raises
    DoesNotFit."""
    capacity, block, before, last, cut = dict(problem.budgets), None, 0.0, None, 1
    shape, workload = problem.shape, problem.workload
    for left in reversed(range(ROUNDS)):
        try:
            plan = choose(shape, hardware, workload, constraints_of(problem, capacity, block))
        except DoesNotFit:
            if block is None or not left:
                raise
            block = None
            continue
        if block is not None and plan.predicted_tokens_per_second < KEPT_BLOCK_SHARE * before:
            # The block lost more than rounding: another one suits the smaller capacity better.
            plan, block = choose(shape, hardware, workload, constraints_of(problem, capacity)), None
        before = plan.predicted_tokens_per_second
        found = choice_of(plan, problem, hardware)
        policy = found.policy
        missing = overshoot(requirements(policy), problem.budgets)
        if not missing:
            # A block that was kept while rounding was mended may have lost more than another one would.
            return found if block is None else faster(found, problem, hardware, requirements, capacity)
        # Rounding is mended within the block; what is missing by more calls for another block, and so does rounding
        # that cannot be mended.
        small = all(size <= ROUNDING * problem.budgets[tier] for tier, size in missing.items())
        block = (policy.gpu_batch_size, policy.num_gpu_batches) if small and left > ROUNDS // 2 else None
        # The same policy again: the optimizer still counts on bytes that the exact sizes do not leave, and more has to
        # go than what is missing.
        last, cut = policy, 2 * cut if policy == last else 1
        for tier, size in missing.items():
            capacity[tier] = max(1, capacity[tier] - cut * (size + size // 20) - PAGE_TOKENS)
    raise DoesNotFit(
        f"{shape.name}: no policy was found in {ROUNDS} rounds whose exact sizes fit the budgets; give any tier one "
        "layer's weights more"
    )


def choice_of(plan: Plan, problem: Problem, hardware: Hardware) -> Choice:
    """The policy of ``plan`` as the engine runs it, priced anew where that differs."""
    policy = executable(problem, plan.policy)
    return Choice(policy, plan if policy == plan.policy else with_search(priced(problem, hardware, policy), plan))


def predicted(choice: Choice) -> float:
    """Tokens per second; 0 where nothing was weighed."""
    return choice.plan.predicted_tokens_per_second if choice.plan else 0.0


def faster(
    found: Choice, problem: Problem, hardware: Hardware, requirements: Requirements, capacity: dict[str, int]
) -> Choice:
    """``found``, or what the optimizer chooses in ``capacity`` with any block where that fits and is faster."""
    try:
        plan = choose(problem.shape, hardware, problem.workload, constraints_of(problem, capacity))
    except DoesNotFit:
        return found
    other = choice_of(plan, problem, hardware)
    if overshoot(requirements(other.policy), problem.budgets):
        return found
    return max(found, other, key=predicted)


def differs(problem: Problem, policy: Policy, job: Job) -> bool:
    """Whether the sizes of a block that were chosen for the problem's job are wrong for another: lengths unlike, or
    more requests than the block was cut to."""
    planned, config = problem.job, problem.config
    if None not in (config.gpu_batch_size, config.num_gpu_batches) or job == planned:
        return False
    if (
        job.num_requests > planned.num_requests
        and policy.block_size >= planned.num_requests
        and policy.block_size < min(job.num_requests, WHOLE_BLOCK)
    ):
        return True
    return policy.block_size < job.num_requests and abs(job.mean_tokens / planned.mean_tokens - 1) > LENGTH_TOLERANCE


def executable(problem: Problem, policy: Policy) -> Policy:
    """The policy as the engine runs it: loaded weights stay on their tiers, and whole prompts are a budget where
    they exceed the engine's own."""
    if problem.loaded is not None:
        policy = dataclasses.replace(policy, weights=problem.loaded.weights)
    if not policy.prefill_budget and policy.prompt_tokens_per_micro_batch > MAX_MICRO_BATCH_TOKENS:
        whole = min(policy.prompt_tokens_per_micro_batch, policy.gpu_batch_size * problem.job.longest_prompt)
        policy = dataclasses.replace(policy, prefill_budget=max(whole, policy.prefill_chunk))
    return policy


def fallbacks(problem: Problem, requirements: Requirements) -> Iterator[Policy]:
    """Simple placements that fit, each with its largest block, and with few prompt tokens a pass where more do not
    fit."""
    for placement in FALLBACK_PLACEMENTS[: 1 if problem.config.percent is not None else None]:
        for policy in ladder(problem, placement):
            if not overshoot(requirements(policy), problem.budgets):
                yield policy
                break


def ladder(problem: Problem, placement: tuple[Split, Split]) -> Iterator[Policy]:
    """Ever smaller blocks of one placement."""
    for budget in [problem.config.prefill_budget] if problem.config.prefill_budget else [512, SMALLEST_PREFILL_BUDGET]:
        sequences = min(WHOLE_BLOCK, problem.job.num_requests)
        while sequences:
            policy = baseline_policy(problem, placement, sequences)
            yield dataclasses.replace(policy, prefill_budget=min(budget, policy.gpu_batch_size * policy.prefill_chunk))
            # Halves rounded up: 50 of 101 would leave one for a third wave.
            sequences = -(-sequences // 2) if sequences > 1 else 0


def without_reserves(hardware: Hardware) -> Hardware:
    """The engine's budgets are for its pools alone: what the context and libraries take is outside of them."""
    return dataclasses.replace(hardware, gpu_reserved_bytes=0, cpu_reserved_bytes=0)


def priced(problem: Problem, hardware: Hardware, policy: Policy) -> Plan:
    """What a policy costs for the problem's job within its budgets."""
    budgets = problem.budgets
    return price(
        problem.shape,
        hardware.with_memory(budgets["gpu"], budgets["cpu"], budgets["disk"]),
        problem.workload,
        policy,
    )


def with_search(plan: Plan, searched_plan: Plan) -> Plan:
    """``plan`` with what the search found beside the policy."""
    names = ("machine_bound_tokens_per_second", "tokens_per_second_per_gib", "linear_programs", "search_seconds")
    return dataclasses.replace(plan, **{name: getattr(searched_plan, name) for name in names})
