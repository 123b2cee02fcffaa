"""From model, settings and job to a policy: the optimizer's sizes and rates on one side, the engine's exact sizes on
the other."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flexbatch.execution.job import Job
from flexbatch.memory.tiers import MemoryRequirement, check_budgets
from flexbatch.models.arch import Arch
from flexbatch.planner.placements import (
    SMALLEST_PREFILL_BUDGET,
    WHOLE_BLOCK,
    Requirements,
    baseline_policy,
    fallbacks,
    fits_in_memory,
    overshoot,
    resident,
)
from flexbatch.planner.problem import Problem, constraints_of
from flexbatch.policy.candidates import Known
from flexbatch.policy.code_choice import with_products_chosen
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.limits import MAX_MICRO_BATCH_TOKENS, PAGE_TOKENS
from flexbatch.policy.optimizer import choose
from flexbatch.policy.piece_graphs import planned_bytes
from flexbatch.policy.plan import DoesNotFit, Plan, price
from flexbatch.policy.policy import Policy
from flexbatch.policy.round_choice import in_rounds
from flexbatch.validation.errors import DoesNotFitError

logger = logging.getLogger("flexbatch")

NO_SEARCH_SHARE = 0.25
"""Share of every budget below which a job is not even priced: whatever is chosen, nothing has to travel."""
ROUNDING = 0.05
"""Share of a budget that whole tensors, sequences and pages may exceed a plan by."""
KEPT_BLOCK_SHARE = 0.97
"""The share of its predicted throughput that a block must keep when it is placed again in a little less memory.
A block of 70 sequences that was kept at any price went to disk with 9 % of its cache, and from 250 to 101 tokens a
second."""
LENGTH_TOLERANCE = 0.25
"""Relative difference of mean lengths from which another job is decided for again."""
NOTHING_LOST = 0.99
"""The share of what was planned with all memory from which a block that was placed again in less is the best one."""
ROUND_BLOCKS = 8
"""Of a long job, that are walked to choose the passes between rounds of admission."""
ROUNDS = 12
"""Choices that may follow each other with less capacity, until the exact sizes fit."""


@dataclass(frozen=True)
class Choice:
    """A policy that fits by exact sizes, and its plan where the optimizer priced it."""

    policy: Policy
    plan: Plan | None


def choose_policy(problem: Problem, hardware: Callable[[], Hardware], requirements: Requirements) -> Choice:
    """The policy of the user's settings, the rest of it chosen; it fits by the engine's exact ``requirements``.

    ``hardware`` is called only when something has to be weighed. Where nothing has to travel, nothing is searched for:
    everything is where the user wants it, or on the gpu tier. Nothing is on the disk where host memory holds the whole
    job. Raises DoesNotFitError with a table of what is missing.
    """
    baseline = baseline_policy(problem)
    if not overshoot(requirements(baseline), problem.budgets, NO_SEARCH_SHARE):
        return Choice(baseline, None)
    machine = without_reserves(hardware())
    if problem.is_fixed:
        # Refused by the caller with the exact table when it does not fit.
        return Choice(baseline, priced(problem, machine, baseline))
    with_graphs = counting_graphs(problem, machine, requirements)
    for policy in resident(problem, baseline, machine.device):
        if not overshoot(with_graphs(policy), problem.budgets):
            return Choice(policy, priced(problem, machine, policy))
    logger.info("planning where everything goes, for %s sequences", f"{problem.job.num_requests:,}")
    if fits_in_memory(problem, requirements):
        dry = dataclasses.replace(problem, budgets={**problem.budgets, "disk": 0})
        with contextlib.suppress(DoesNotFitError):
            found = weighed(dry, machine, requirements)
            if found.policy.block_size >= baseline.block_size or problem.config.gpu_batch_size is not None:
                return Choice(found.policy, priced(problem, machine, found.policy, found.plan))
    return weighed(problem, machine, requirements)


def weighed(problem: Problem, machine: Hardware, requirements: Requirements) -> Choice:
    """The fastest of the search's choice and the simple placements. Raises DoesNotFitError."""
    simple = (Choice(policy, priced(problem, machine, policy)) for policy in fallbacks(problem, requirements))
    found = [with_faster_products(problem, choice, lambda: machine) for choice in simple]
    refusal = None
    for needs in (counting_graphs(problem, machine, requirements), requirements):
        try:
            found.append(searched(problem, machine, needs))
            break
        except (DoesNotFit, DoesNotFitError) as error:
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


def on_slowest(problem: Problem, arches: Iterable[Arch], choice: Choice, hardware: Callable[[], Hardware]) -> Choice:
    """The choice with the plan of that stage of a pipeline which takes longest: every pass waits for it."""
    if choice.plan is None or problem.arch.stage is None:
        return choice
    machine, others = without_reserves(hardware()), (arch for arch in arches if arch != problem.arch)
    problems = (dataclasses.replace(problem, arch=arch, known=Known()) for arch in others)
    plans = [priced(each, machine, choice.policy, choice.plan) for each in problems]
    return Choice(choice.policy, min([choice.plan, *plans], key=lambda plan: plan.predicted_tokens_per_second))


def with_faster_products(problem: Problem, choice: Choice, known: Callable[[], Hardware | None]) -> Choice:
    """The choice with quantized weights expanded for few tokens, too, where that is faster. known: the machine as far
    as it is without measuring; where nothing had to be weighed and nothing is known of it, codes stay."""
    planned = choice.plan
    if choice.policy.weight_bits == 16 or (machine := planned.hardware if planned else known()) is None:
        return choice
    policy = with_products_chosen(problem.shape, machine, problem.workload, choice.policy)
    if policy == choice.policy:
        return choice
    return Choice(policy, planned and priced(problem, machine, policy, planned))


def filled_in_rounds(problem: Problem, choice: Choice) -> Choice:
    """The choice with the passes between rounds of admission that make it fastest: a part of a long job says which, as
    such jobs are walked with a smaller block, in which places become free in fewer passes."""
    if (planned := choice.plan) is None:
        return choice
    machine, policy, job = planned.hardware, choice.policy, problem.job
    step = max(1, job.num_requests // (ROUND_BLOCKS * policy.block_size))
    part = problem if step == 1 else dataclasses.replace(problem, job=job.of_every(step), known=Known())
    plan = planned if step == 1 else priced(part, machine, policy)
    passes = in_rounds(plan, lambda other: priced(part, machine, other)).policy.admission_passes
    if passes == policy.admission_passes:
        return choice
    policy = dataclasses.replace(policy, admission_passes=passes)
    return Choice(policy, priced(problem, machine, policy, planned))


def counting_graphs(problem: Problem, machine: Hardware, requirements: Requirements) -> Requirements:
    """The requirements with those decode graphs that a block on the gpu tier is planned with: one that leaves no memory
    for them is launched kernel by kernel."""

    def needs(policy: Policy) -> list[MemoryRequirement]:
        rows = requirements(policy)
        if any(split.gpu < 1 for split in (policy.weights, policy.cache, policy.activations)):
            return rows
        size = planned_bytes(problem.shape, policy, machine, problem.job.longest)
        return [*rows, MemoryRequirement("decode graphs", "gpu", size)] if size else rows

    return needs


def searched(problem: Problem, hardware: Hardware, requirements: Requirements) -> Choice:
    """Returns the optimizer's choice. While exact sizes exceed a budget, it chooses again with less capacity. Raises
    DoesNotFit, or DoesNotFitError with exact sizes."""
    capacity, block, before, last, cut, most = dict(problem.budgets), None, 0.0, None, 1, 0.0
    shape, workload = problem.shape, problem.workload
    for left in reversed(range(ROUNDS)):
        try:
            plan = choose(shape, hardware, workload, constraints_of(problem, capacity, block), problem.known)
        except DoesNotFit:
            if block is None or not left:
                if last is not None:  # by exact sizes, and not by what the search was left with
                    check_budgets(requirements(last), problem.budgets)
                raise
            block = None
            continue
        if block is not None and plan.predicted_tokens_per_second < KEPT_BLOCK_SHARE * before:
            # The block lost more than rounding: another one may suit the smaller capacity better. A search is no proof
            # of that: one that was believed took a block of 972 for 1,009 prompts, and from 148 to 84 tokens a second.
            other = choose(shape, hardware, workload, constraints_of(problem, capacity), problem.known)
            plan, block = max(plan, other, key=lambda each: each.predicted_tokens_per_second), None
        before = plan.predicted_tokens_per_second
        most = most or before
        found = choice_of(plan, problem, hardware)
        policy = found.policy
        missing = overshoot(requirements(policy), problem.budgets)
        if not missing:
            # A block that was kept while rounding was mended may have lost more than another one would.
            best = block is None or before >= NOTHING_LOST * most
            return found if best else faster(found, problem, hardware, requirements, capacity)
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
    return Choice(policy, plan if policy == plan.policy else priced(problem, hardware, policy, plan))


def predicted(choice: Choice) -> float:
    """Tokens per second; 0 where nothing was weighed."""
    return choice.plan.predicted_tokens_per_second if choice.plan else 0.0


def faster(
    found: Choice, problem: Problem, hardware: Hardware, requirements: Requirements, capacity: dict[str, int]
) -> Choice:
    """``found``, or what the optimizer chooses in ``capacity`` with any block where that fits and is faster."""
    try:
        plan = choose(problem.shape, hardware, problem.workload, constraints_of(problem, capacity), problem.known)
    except DoesNotFit:
        return found
    other = choice_of(plan, problem, hardware)
    if overshoot(requirements(other.policy), problem.budgets):
        return found
    return max(found, other, key=predicted)


def differs(problem: Problem, policy: Policy, job: Job, tolerance: float = LENGTH_TOLERANCE) -> bool:
    """Whether the sizes of a block that were chosen for the problem's job are wrong for another: mean lengths unlike by
    more than a ``tolerance``, or more requests than the block was cut to."""
    planned, config = problem.job, problem.config
    if None not in (config.gpu_batch_size, config.num_gpu_batches) or job == planned:
        return False
    if (
        job.num_requests > planned.num_requests
        and policy.block_size >= planned.num_requests
        and policy.block_size < min(job.num_requests, WHOLE_BLOCK)
    ):
        return True
    return policy.block_size < job.num_requests and abs(job.mean_tokens / planned.mean_tokens - 1) > tolerance


def executable(problem: Problem, policy: Policy) -> Policy:
    """The policy as the engine runs it: loaded weights stay on their tiers, and whole prompts are a budget where
    they exceed the engine's own."""
    if problem.loaded is not None:
        policy = dataclasses.replace(policy, weights=problem.loaded.weights)
    if not policy.prefill_budget and policy.prompt_tokens_per_micro_batch > MAX_MICRO_BATCH_TOKENS:
        whole = min(policy.prompt_tokens_per_micro_batch, policy.gpu_batch_size * problem.job.longest_prompt)
        policy = dataclasses.replace(policy, prefill_budget=max(whole, policy.prefill_chunk))
    return policy


def without_reserves(hardware: Hardware) -> Hardware:
    """The engine's budgets are for its pools alone: what the context and libraries take is outside of them."""
    return dataclasses.replace(hardware, gpu_reserved_bytes=0, cpu_reserved_bytes=0)


def priced(
    problem: Problem, hardware: Hardware, policy: Policy, searched_plan: Plan | None = None, exact: bool = True
) -> Plan:
    """What a policy costs for the problem's job within its budgets. searched_plan: of the search that found it. exact:
    see `passes_of`."""
    budgets = problem.budgets
    machine = hardware.with_memory(budgets["gpu"], budgets["cpu"], budgets["disk"])
    passes = problem.known.passes(problem.workload, policy, exact, problem.shape.layer_window)
    counted = price(problem.shape, machine, problem.workload, with_budget(policy), passes)
    plan = dataclasses.replace(counted, policy=policy)
    return plan if searched_plan is None else with_search(plan, searched_plan)


def with_budget(policy: Policy) -> Policy:
    """The policy with the prompt tokens that its passes have where it names none: for the optimizer a block without
    a budget reads all its prompts in one pass, for the engine no more of them than `micro_batch_tokens` counts."""
    if policy.prefill_budget or policy.prompt_tokens_per_micro_batch <= MAX_MICRO_BATCH_TOKENS:
        return policy
    return dataclasses.replace(policy, prefill_budget=max(MAX_MICRO_BATCH_TOKENS, policy.chunk))


def with_search(plan: Plan, searched_plan: Plan) -> Plan:
    """``plan`` with what the search found beside the policy."""
    names = ("machine_bound_tokens_per_second", "tokens_per_second_per_gib", "linear_programs", "search_seconds")
    return dataclasses.replace(plan, **{name: getattr(searched_plan, name) for name in names})
