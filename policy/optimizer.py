"""The search for the best policy: micro-batch size and count, bits, tree and prompt budget outside, a linear program
over the splits inside."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Iterator

from flexbatch.policy.affine import KINDS
from flexbatch.policy.bound import MachineBound
from flexbatch.policy.candidates import Known
from flexbatch.policy.families import families, templates
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.lp import fixed_fractions
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.pass_load import Lengths
from flexbatch.policy.plan import Plan, price
from flexbatch.policy.policy import Constraints, Policy
from flexbatch.policy.rounding import does_not_fit
from flexbatch.policy.search import Search, family_of
from flexbatch.policy.workload import Workload

GRID_BATCHES = tuple(2**i for i in range(11))
GRID_COUNTS = (1, 4, 16, 64)
MIN_BUDGET = 256
"""Prompt tokens that a micro-batch may always bring: fewer would cut prompts into crumbs to save little memory."""
FILLS = (1.0, 0.5, 0.25, 0.0)
"""How fast an empty block fills: the share of a sequence's stay over which prompts are spread. 1 keeps every pass
alike, 0 brings all at once."""
FINALISTS = 12
CLIMB = 60
"""Sizes that the search around the best grid points may compare."""
FEW_WAVES = 8
"""Waves of a job from which a small last one costs too little to look for others."""
POLISHED = 4
"""Plans whose prompt budget is tried out, and smaller blocks that are compared with the best after rounding."""
DISK_GAIN = 0.01
"""What the disk must gain over the best plan without it: it is the resource that is predicted worst, and all that
lies there is written first."""
DISK_FACTORS = (1.0, 1.1, 1.2, 1.35, 1.5, 2.0, 2.5, 5.0)
"""Sizes of blocks that are tried with the disk, as multiples of the best without it."""
GOOD_ENOUGH = 0.995
"""The share of the machine's bound above which nothing is left to search for."""


def budget_of(workload: Workload, policy: Policy, fill: float) -> int:
    """Prompt tokens of a micro-batch in a pass so that a block fills within ``fill`` of a sequence's stay; 0 when
    that limits nothing."""
    lengths = Lengths.of(workload, policy)
    passes = max(lengths.prompt_passes, fill * lengths.residence)
    budget = max(MIN_BUDGET, math.ceil(policy.gpu_batch_size * lengths.prompt / passes))
    return budget if budget < policy.gpu_batch_size * policy.prefill_chunk else 0


def effort(template: Policy, whole: int) -> int:
    """A third of the ``whole`` effort for caches that reach to the disk, which seldom win and then by far."""
    return whole // 3 if template.cache.disk else whole


def block_policy(search: Search, template: Policy, batch: int, count: int, fill: float) -> Policy:
    """``template`` with the sizes of a block; what the user fixed stays."""
    constraints = search.constraints
    batch, count = constraints.gpu_batch_size or batch, constraints.num_gpu_batches or count
    if search.workload.num_sequences is not None:
        # Sequences beyond the job's would only reserve memory.
        batch = constraints.gpu_batch_size or min(batch, search.workload.num_sequences)
        count = constraints.num_gpu_batches or min(count, math.ceil(search.workload.num_sequences / batch))
    policy = dataclasses.replace(template, gpu_batch_size=batch, num_gpu_batches=count)
    budget = (
        budget_of(search.workload, policy, fill) if constraints.prefill_budget is None else constraints.prefill_budget
    )
    return dataclasses.replace(policy, prefill_budget=budget)


def first_fill(search: Search, block: float) -> float:
    """A job of few blocks loses more by filling slowly than by unequal passes."""
    total = search.workload.num_sequences
    return 1.0 if total is None or total > 4 * block else 0.5


def grid(sequences: float, step: int = 1) -> list[tuple[int, int]]:
    """Sizes in powers of two (with ``step`` 2, of four) and counts in powers of four, those nearest to ``sequences`` in
    flight first, so that the rest is pruned early."""
    pairs = itertools.product(GRID_BATCHES[::step], GRID_COUNTS)
    return sorted(pairs, key=lambda pair: (abs(math.log2(pair[0] * pair[1] / sequences)), abs(pair[1] - 4)))


def neighbors(policy: Policy, total: int | None) -> Iterator[tuple[int, int]]:
    """Other sizes around a policy's: by one, by an eighth and by a third, the same block cut differently, and those
    that take the job in whole waves."""
    b, k = policy.gpu_batch_size, policy.num_gpu_batches
    for factor in (1.34, 0.75, 1.13, 0.89):
        yield max(b + (1 if factor > 1 else -1), round(b * factor)), k
        yield b, max(k + (1 if factor > 1 else -1), round(k * factor))
    yield b + 1, k
    yield b - 1, k
    yield math.ceil(b * k / (k + 1)), k + 1
    if k > 1:
        yield b * k // (k - 1), k - 1
    if total is not None:
        yield from ((batch, k) for batch in balanced(total, b, k) if batch != b)


def balanced(total: int, batch: int, count: int) -> list[int]:
    """Sizes of ``count`` micro-batches that take a job in whole waves of equal size: as many as ``batch`` takes, one
    fewer, one more. Of 184 sequences a block of 87 leaves 10 for a third wave, which takes as many passes as the
    others; 92 leaves none."""
    waves = math.ceil(total / (batch * count))
    if waves > FEW_WAVES:
        return []
    return [math.ceil(math.ceil(total / each) / count) for each in (waves, waves - 1, waves + 1) if each]


def explore(search: Search, template: Policy, bound: MachineBound) -> None:
    """The grid, then hill climbing from its best points, then other fills."""
    good = GOOD_ENOUGH * bound.tokens_per_second
    for batch, count in grid(bound.sequences, 2 if template.cache.disk else 1):
        search.attempt(block_policy(search, template, batch, count, first_fill(search, batch * count)))
    limit = search.weighed + effort(template, CLIMB)

    def climb(sizes: Iterable[Policy]) -> bool:
        before = search.top(template)
        for policy in sizes:
            if search.weighed < limit and search.top(template) < good:
                search.attempt(policy)
        return search.top(template) > before * (1 + 1e-4)

    improved = search.top(template) > 0
    while improved:
        improved = False
        for seed in search.best(template, 2):
            fills = {
                first_fill(search, seed.policy.block_size),
                *(FILLS if search.workload.num_sequences is not None else ()),
            }
            p = seed.policy
            improved |= climb(
                block_policy(search, template, p.gpu_batch_size, p.num_gpu_batches, fill) for fill in sorted(fills)
            )
            budget = p.prefill_budget / p.gpu_batch_size
            for batch, count in neighbors(p, search.workload.num_sequences):
                if batch >= 1 and count >= 1:
                    other = block_policy(search, template, batch, count, 1.0)
                    free = search.constraints.prefill_budget is None and search.workload.num_sequences is not None
                    if free:
                        other = dataclasses.replace(other, prefill_budget=math.ceil(budget * other.gpu_batch_size))
                    improved |= climb([other])


def polish(search: Search, best: Plan) -> Plan:
    """The best of ``best``, slightly smaller blocks and those of whole waves: where rounding to whole tensors costs
    what the larger block gains, one that rounds well wins."""
    policy = best.policy
    if search.constraints.gpu_batch_size is not None:
        return best
    size, total = policy.gpu_batch_size, search.workload.num_sequences
    whole = balanced(total, size, policy.num_gpu_batches) if total is not None else []
    for batch in dict.fromkeys([*range(size - 1, max(0, size - 1 - POLISHED), -1), *whole]):
        other = block_policy(
            search,
            dataclasses.replace(policy, prefill_budget=0),
            batch,
            policy.num_gpu_batches,
            first_fill(search, policy.block_size),
        )
        # The best of the linear programs' values stands for a placement that rounding may have made slower: it must not
        # prune here.
        candidate = search.attempt(other, best.predicted_tokens_per_second)
        plan = search.finish(candidate) if candidate else None
        if plan is not None and plan.predicted_tokens_per_second > best.predicted_tokens_per_second:
            best = plan
    return best


def with_best_budget(search: Search, best: Plan) -> Plan:
    """``best`` with twice or half its prompt budget, as long as that is faster and fits: priced pass by pass.

    The linear program's average passes cannot tell that a block on the GPU decodes in one graph when no prompts are
    in the pass, so that few passes with many prompts are better than many with few (OPT-1.3B, 9 sequences on the
    H200: 1,153 tok/s with one prompt a pass, 1,580 with two).
    """
    if search.constraints.prefill_budget is not None:
        return best
    for factor in (2.0, 0.5):
        while True:
            policy = best.policy
            budget = math.ceil(factor * policy.prompt_tokens_per_micro_batch)
            if not MIN_BUDGET <= budget < 2 * policy.gpu_batch_size * policy.prefill_chunk:
                break
            plan = search.price(dataclasses.replace(policy, prefill_budget=budget))
            if plan.missing or plan.predicted_tokens_per_second <= best.predicted_tokens_per_second:
                break
            best = dataclasses.replace(plan, tokens_per_second_per_gib=best.tokens_per_second_per_gib)
    return best


def finals(search: Search, template: Policy) -> list[Plan]:
    """The best candidates of a family as whole tensors and sequences meet them, and priced pass by pass.

    The linear program sees a job as four average passes, so that its order among candidates is not the last word.
    """
    count = effort(template, FINALISTS)
    plans = [plan for plan in map(search.finish, search.best(template, count)) if plan]
    return plans or [plan for plan in map(search.finish, search.best(template, 3 * FINALISTS)[count:]) if plan]


def choose(
    shape: ModelShape,
    hardware: Hardware,
    workload: Workload,
    constraints: Constraints | None = None,
    known: Known | None = None,
) -> Plan:
    """The policy with the highest predicted throughput that fits, with the predictions.

    What ``constraints`` fixes stays as given. known: what other searches for the same model, rates and job have
    computed, with any budgets. Raises `plan.DoesNotFit` with a table of what is missing.
    """
    start = time.perf_counter()
    constraints = constraints or Constraints()
    hardware = hardware.with_memory(constraints.gpu_memory, constraints.cpu_memory, constraints.disk)
    search = Search(shape, hardware, workload, constraints, known=known or Known())
    bounds = families(search)
    best = best_plan_of_all(search, bounds)
    if best is None:
        raise does_not_fit(
            shape,
            hardware,
            workload,
            constraints,
            block_policy(search, templates(workload, constraints)[-1], 1, 1, 1.0),
        )
    passes = search.known.passes(workload, best.policy, window=shape.layer_window)
    counted = price(shape, hardware, workload, best.policy, passes)
    limit = max(bound.tokens_per_second for bound, _ in bounds)
    elapsed = time.perf_counter() - start
    return dataclasses.replace(
        counted,
        tokens_per_second_per_gib=best.tokens_per_second_per_gib,
        machine_bound_tokens_per_second=limit,
        linear_programs=search.linear_programs + len(bounds),
        search_seconds=elapsed,
    )


def best_plan_of_all(search: Search, bounds: list[tuple[MachineBound, Policy]]) -> Plan | None:
    """The best plan; of those that use the disk, only one that gains more than DISK_GAIN by it. None when nothing
    fits."""
    fixed = fixed_fractions(search.constraints)
    if search.placement_given or any(fixed.get(f"{kind}_disk") for kind in KINDS):
        return best_plan(search, bounds)
    dry = dataclasses.replace(search, hardware=search.hardware.with_memory(disk=0))
    plan = best_plan(dry, [(bound, template) for bound, template in bounds if not template.cache.disk])
    search.linear_programs = dry.linear_programs
    if plan is not None:
        # The program's dual is that of a machine without a disk; here it has capacity that the plan leaves.
        duals = {**plan.tokens_per_second_per_gib, "disk": 0.0}
        plan = dataclasses.replace(plan, hardware=search.hardware, tokens_per_second_per_gib=duals)
        # Whole tensors and sequences may lose much of what the program promised, where memory is all but full.
        rate = min(plan.predicted_tokens_per_second, max(dry.top(template) for _, template in bounds))
        if not disk_could_gain(search, bounds, plan, rate):
            return plan
    best = best_plan(search, bounds)
    if best is None or plan is None:
        return best or plan
    least = (1 - DISK_GAIN) * best.predicted_tokens_per_second
    return plan if plan.predicted_tokens_per_second >= least else best


def disk_could_gain(search: Search, bounds: list[tuple[MachineBound, Policy]], dry: Plan, rate: float) -> bool:
    """Whether blocks of the size of ``dry``, which leaves the disk alone, and larger ones would be faster than ``rate``
    with it, by more than DISK_GAIN: a few programs, before a search of its own."""
    batch, count = dry.policy.gpu_batch_size, dry.policy.num_gpu_batches
    for (_, template), factor, others in itertools.product(bounds, DISK_FACTORS, (count, count + 1)):
        size = max(1, round(batch * count * factor / others))
        policy = block_policy(search, template, size, others, first_fill(search, size * others))
        candidate = search.attempt(policy, rate)
        if candidate is not None and candidate.tokens_per_second > (1 + DISK_GAIN) * rate:
            return True
    return False


def best_plan(search: Search, bounds: list[tuple[MachineBound, Policy]]) -> Plan | None:
    """The plan with the highest predicted throughput of all families; None when nothing fits."""
    for bound, template in sorted(bounds, key=lambda pair: -pair[0].tokens_per_second):
        if all(
            search.top(other) < bound.tokens_per_second
            for _, other in bounds
            if family_of(other)[2:] == family_of(template)[2:]
        ):
            explore(search, template, bound)
    plans = [plan for _, template in bounds for plan in finals(search, template)]
    if not plans:
        return None
    first = sorted(plans, key=lambda plan: -plan.predicted_tokens_per_second)[:POLISHED]
    polished = [with_best_budget(search, plan) for plan in (*first[1:], polish(search, first[0]))]
    return max(polished, key=lambda plan: plan.predicted_tokens_per_second)
