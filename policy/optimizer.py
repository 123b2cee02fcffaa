"""The search for the best policy: micro-batch size and count, bits, tree and prompt budget outside, a linear program
over the splits inside."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterable

from flexbatch.policy.affine import KINDS
from flexbatch.policy.blocks import FILLS, block_policy, coarse, first_fill, grid, neighbors, on_gpu
from flexbatch.policy.bound import MachineBound
from flexbatch.policy.candidates import Known
from flexbatch.policy.code_choice import with_products_chosen
from flexbatch.policy.families import families, templates
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.lp import fixed_fractions
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.plan import Plan, price
from flexbatch.policy.policy import Constraints, Policy
from flexbatch.policy.polish import POLISHED, polish, recut, with_best_budget
from flexbatch.policy.rounding import does_not_fit
from flexbatch.policy.search import Search
from flexbatch.policy.workload import Workload

FINALISTS = 8
CLIMB = 60
"""Sizes that the search around the best grid points may compare."""
QUICK = tuple(itertools.product((1, 0.5, 2, 4), (1, 4)))
"""What a family of policies is tried with before its own search: the best block of another, smaller and larger, and
these cut into more micro-batches."""
IN_SIGHT = 0.8
"""The share of the best candidate's throughput below which a family is given up. Whole tensors and the passes of the
job take 2 to 15 % of what the linear program promises, in all families of one model about alike."""
DISK_GAIN = 0.01
"""What the disk must gain over the best plan without it: it is the resource that is predicted worst, and all that
lies there is written first."""
DISK_FACTORS = (1.0, 1.1, 1.2, 1.35, 1.5, 2.0, 2.5, 5.0)
"""Sizes of blocks that are tried with the disk, as multiples of the best without it."""
GOOD_ENOUGH = 0.995
"""The share of the machine's bound above which nothing is left to search for."""


def effort(search: Search, template: Policy, whole: int) -> int:
    """A third of the ``whole`` effort for caches that reach to the disk, which seldom win: where blocks of one are the
    best so far, the whole."""
    behind = search.top(template) < max(search.tops.values(), default=0.0)
    return whole // 3 if template.cache.disk and behind else whole


def explore(search: Search, template: Policy, bound: MachineBound, sizes: Iterable[tuple[int, int]]) -> None:
    """The blocks of these sizes, then hill climbing from the best of them, then other fills."""
    good = GOOD_ENOUGH * bound.tokens_per_second
    for batch, count in (*on_gpu(search, template), *sizes):
        search.attempt(block_policy(search, template, batch, count, first_fill(search, batch * count)))
    limit = search.weighed + effort(search, template, CLIMB)

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
                        other = dataclasses.replace(other, prefill_budget=coarse(budget * other.gpu_batch_size))
                    improved |= climb([other])


def finals(search: Search, template: Policy) -> list[Plan]:
    """The best candidates of a family as whole tensors and sequences meet them, and priced pass by pass.

    The linear program sees a job as four average passes, so that its order among candidates is not the last word.
    """
    count = effort(search, template, FINALISTS)
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
    # The search has products in codes everywhere: which placement is the best hardly depends on them.
    policy = with_products_chosen(shape, hardware, workload, best.policy)
    counted = price(shape, hardware, workload, policy, passes)
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
    plan, most = best_plan_without_disk(search, bounds)
    if plan is None:
        return best_plan(search, bounds)
    # The program's dual is that of a machine without a disk; here it has capacity that the plan leaves.
    duals = {**plan.tokens_per_second_per_gib, "disk": 0.0}
    plan = dataclasses.replace(plan, hardware=search.hardware, tokens_per_second_per_gib=duals)
    # Whole tensors and sequences may lose much of what the program promised, where memory is all but full.
    rate = min(plan.predicted_tokens_per_second, most)
    if not disk_could_gain(search, bounds, plan, rate):
        return plan
    best = best_plan(search, bounds, with_disk(plan.policy))
    if best is None:
        return plan
    least = (1 - DISK_GAIN) * best.predicted_tokens_per_second
    return plan if plan.predicted_tokens_per_second >= least else best


def best_plan_without_disk(search: Search, bounds: list[tuple[MachineBound, Policy]]) -> tuple[Plan | None, float]:
    """The best plan, and what the programs promise at most. A search with the disk often follows one without."""
    budgets = search.hardware.gpu_memory_bytes, search.hardware.cpu_memory_bytes
    key = (*budgets, dataclasses.replace(search.constraints, gpu_memory=None, cpu_memory=None, disk=None))
    if key not in search.known.dry:
        dry = dataclasses.replace(search, hardware=search.hardware.with_memory(disk=0))
        plan = best_plan(dry, [(bound, template) for bound, template in bounds if not template.cache.disk])
        search.linear_programs = dry.linear_programs
        search.known.dry[key] = plan, max((dry.top(template) for _, template in bounds), default=0.0)
    return search.known.dry[key]


def with_disk(dry: Policy) -> list[tuple[int, int]]:
    """Sizes of blocks that the disk may make room for beside the best block without it."""
    batch, count = dry.gpu_batch_size, dry.num_gpu_batches
    factors = itertools.product(DISK_FACTORS, (count, count + 1))
    return [(max(1, round(batch * count * factor / others)), others) for factor, others in factors]


def disk_could_gain(search: Search, bounds: list[tuple[MachineBound, Policy]], dry: Plan, rate: float) -> bool:
    """Whether blocks of the size of ``dry``, which leaves the disk alone, and larger ones would be faster than ``rate``
    with it, by more than DISK_GAIN: a few programs, before a search of its own."""
    for (_, template), (size, others) in itertools.product(bounds, with_disk(dry.policy)):
        policy = block_policy(search, template, size, others, first_fill(search, size * others))
        candidate = search.attempt(policy, rate)
        if candidate is not None and candidate.tokens_per_second > (1 + DISK_GAIN) * rate:
            return True
    return False


def in_sight(search: Search, template: Policy, best: tuple[float, Policy] | None) -> bool:
    """Whether a family comes near the ``best`` candidate so far with blocks of about that one's size, or with one on
    the GPU, or has others."""
    if best is None:
        return True
    rate, policy = best
    sizes = [
        (max(1, round(factor * policy.gpu_batch_size / cut)), policy.num_gpu_batches * cut) for factor, cut in QUICK
    ]
    for batch, count in (*on_gpu(search, template), *sizes):
        search.attempt(block_policy(search, template, batch, count, first_fill(search, batch * count)))
    return not search.top(template) or search.top(template) >= IN_SIGHT * rate


def best_plan(
    search: Search, bounds: list[tuple[MachineBound, Policy]], sizes: list[tuple[int, int]] | None = None
) -> Plan | None:
    """The plan with the highest predicted throughput of all families; None when nothing fits. sizes: of the blocks to
    begin with (default: a grid of all sizes)."""
    best: tuple[float, Policy] | None = None
    kept: list[Policy] = []
    for bound, template in sorted(bounds, key=lambda pair: -pair[0].tokens_per_second):
        if (best is not None and best[0] >= bound.tokens_per_second) or not in_sight(search, template, best):
            continue
        kept.append(template)
        step = 2 if template.cache.disk else 1
        explore(search, template, bound, sizes or grid(bound.sequences, step))
        if best is None or search.top(template) > best[0]:
            best = (search.top(template), search.best(template, 1)[0].policy) if search.top(template) else best
    plans = [
        plan
        for template in kept
        if best and search.top(template) >= IN_SIGHT * best[0]
        for plan in finals(search, template)
    ]
    if not plans:
        return None
    first = sorted(plans, key=lambda plan: -plan.predicted_tokens_per_second)[:POLISHED]
    polished = [with_best_budget(search, plan) for plan in (*first[1:], polish(search, first[0]))]
    return recut(search, max(polished, key=lambda plan: plan.predicted_tokens_per_second))
