"""What is tried around the best plan of a search, priced pass by pass: smaller blocks and whole waves, other prompt
budgets, the same block in other micro-batches."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

from flexbatch.policy.blocks import MIN_BUDGET, balanced, block_policy, coarse, first_fill
from flexbatch.policy.plan import Plan, price
from flexbatch.policy.policy import Policy
from flexbatch.policy.search import Search

POLISHED = 4
"""Plans whose prompt budget is tried out, and smaller blocks that are compared with the best after rounding."""
RECUTS = 4
"""How often the best plan's block may be cut anew."""
NEARLY = 1.1
"""Times the best plan's block that another one may be which takes the job in a wave less: blocks of 183 and of 184 for
184 prompts took equally many passes with the prompt budget that they were compared with, and 6 % more with the best."""
CUT_BUDGETS = (1.0, 1.4, 2.0, 0.7, 0.5)
"""Prompt tokens of a micro-batch, as multiples of the best plan's."""


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


def recut(search: Search, best: Plan) -> Plan:
    """``best`` in other micro-batches and with other prompt budgets, placed anew and priced pass by pass, as long as
    that is faster.

    A pass's workspace is that of one micro-batch, so that a block in twice as many reads twice as many prompts a pass
    in the same memory. The linear program's average passes do not see how many passes that spares: of OPT-30B's 92
    sequences in 16 GiB it prefers two micro-batches (39 passes, 48.3 tok/s) to four (35 passes, 51.2).
    """
    total = search.workload.num_sequences
    if total is None or search.is_long(best.policy):
        return best
    seen, rate = {sizes_of(best.policy)}, exact_rate(search, best.policy)
    for _ in range(RECUTS):
        before = rate
        for other in cuts(search, best.policy):
            if sizes_of(other) in seen:
                continue
            seen.add(sizes_of(other))
            candidate = search.attempt(other, best.predicted_tokens_per_second)
            plan = search.finish(candidate) if candidate else None
            if plan is None or plan.predicted_tokens_per_second <= best.predicted_tokens_per_second:
                continue
            exact = exact_rate(search, plan.policy)
            if exact > rate:
                best, rate = plan, exact
        if rate <= before * (1 + 1e-3):
            break
    return best


def exact_rate(search: Search, policy: Policy) -> float:
    """Predicted tokens per second with the pages of tiers counted, as the plan that is chosen is priced: without them
    an order of two plans may be the other one by 2 %."""
    passes = search.known.passes(search.workload, policy, window=search.shape.layer_window)
    return price(search.shape, search.hardware, search.workload, policy, passes).predicted_tokens_per_second


def cuts(search: Search, policy: Policy) -> Iterator[Policy]:
    """The block of ``policy``, and one that is a little larger and spares the job a wave, in as many micro-batches, one
    more and twice as many, with other budgets each."""
    block, budget, count = policy.block_size, policy.prompt_tokens_per_micro_batch, policy.num_gpu_batches
    for size, others in itertools.product(blocks_of(search, block), (count, count + 1, 2 * count)):
        cut = block_policy(search, policy, math.ceil(size / others), others, 1.0)
        for factor in CUT_BUDGETS if search.constraints.prefill_budget is None else ():
            tokens = coarse(max(MIN_BUDGET, factor * budget))
            if tokens < 2 * cut.gpu_batch_size * cut.prefill_chunk:
                yield dataclasses.replace(cut, prefill_budget=tokens)
        if search.constraints.prefill_budget is not None:
            yield cut


def blocks_of(search: Search, block: int) -> list[int]:
    """``block``, and where it is nearly that the one that takes the job in a wave less."""
    total = search.workload.num_sequences or block
    whole = math.ceil(total / max(1, math.ceil(total / block) - 1))
    return [block, whole] if block < whole <= NEARLY * block else [block]


def sizes_of(policy: Policy) -> tuple[int, int, int]:
    return policy.gpu_batch_size, policy.num_gpu_batches, policy.prompt_tokens_per_micro_batch


def with_best_budget(search: Search, best: Plan) -> Plan:
    """``best`` with a larger or half its prompt budget, as long as that is faster and fits: priced pass by pass.

    The linear program's average passes cannot tell that a block on the GPU decodes in one graph when no prompts are
    in the pass, so that few passes with many prompts are better than many with few (OPT-1.3B, 9 sequences on the
    H200: 1,153 tok/s with one prompt a pass, 1,580 with two).
    """
    if search.constraints.prefill_budget is not None:
        return best
    if on_gpu := search.is_long(best.policy) and min(best.policy.percent[::2]) >= 100:
        # The average pass of a long job always has prompts in it.
        best = replaced(best, search.price(best.policy, whole=True))
    for factor in (2.0, 1.4, 0.7, 0.5) if on_gpu else (2.0, 1.4, 0.5):
        while True:
            policy = best.policy
            budget = coarse(factor * policy.prompt_tokens_per_micro_batch)
            if not MIN_BUDGET <= budget < 2 * policy.gpu_batch_size * policy.prefill_chunk:
                break
            plan = search.price(dataclasses.replace(policy, prefill_budget=budget), whole=on_gpu)
            if plan.missing or plan.predicted_tokens_per_second <= best.predicted_tokens_per_second:
                break
            best = replaced(best, plan)
    return best


def replaced(best: Plan, plan: Plan) -> Plan:
    """``plan`` with what more memory buys, as of ``best``."""
    return dataclasses.replace(plan, tokens_per_second_per_gib=best.tokens_per_second_per_gib)
