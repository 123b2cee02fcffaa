"""Another block for what is left of a job, now that its answers are not as long as assumed.

Passes wait for whatever is decided here. So the block in flight is first made larger or smaller as it is, every split
where it was, which takes a few milliseconds; a search among all placements, which takes seconds, is for jobs that go on
for long enough.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from functools import partial

from flexbatch.execution.job import Job
from flexbatch.planner.choose import counting_graphs, priced
from flexbatch.planner.engine_plan import EnginePlan
from flexbatch.planner.placements import Requirements, overshoot
from flexbatch.planner.problem import Problem
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.plan import Plan
from flexbatch.policy.policy import Policy

LEAST_GAIN = 0.1
"""Of throughput, that another block must promise before sequences in flight are read anew for it."""
SEARCH_SHARE = 0.05
"""Of the time that is left, that a search may take where a block of another size is there without one. Two searches in
the middle of a job of 110 s on an H200 took 30 s of it, all that twice as many sequences in flight had gained."""


def resized(rest: Problem, before: EnginePlan, needs: Requirements) -> EnginePlan | None:
    """The block ``before`` with as many sequences of what is left as the budgets hold, and everything where it was;
    None where the user fixed their number, or not one fits. Its micro-batches read as many prompt tokens in a pass as
    they did, or as many for each sequence, whichever is faster: buffers for these take memory from the cache."""
    assert before.plan is not None
    policy, machine = before.policy, before.plan.hardware
    if before.config.gpu_batch_size is not None:
        return None
    with_graphs, most = counting_graphs(rest, machine, needs), math.ceil(rest.job.num_requests / policy.num_gpu_batches)

    def exceeds(scaled: bool, size: int) -> bool:
        return bool(overshoot(with_graphs(of_size(policy, size, scaled)), rest.budgets))

    found: EnginePlan | None = None
    for scaled in (False, True):
        if size := bisect.bisect_left(range(1, most + 1), True, key=partial(exceeds, scaled)):
            sized = of_size(policy, size, scaled)
            found = faster(dataclasses.replace(before, policy=sized, plan=estimated(rest, machine, sized)), found)
    return found


def estimated(rest: Problem, machine: Hardware, policy: Policy) -> Plan:
    """What a policy costs for what is left of a job. With likely answers pages are estimated anew in every pass of a
    walk, which then takes 0.3 s for 760 sequences and not 0.01, and nobody decodes meanwhile. Slots alone give 1 to 7 %
    fewer passes, of any block."""
    return priced(rest, machine, policy, exact=not rest.job.likely_tokens)


def of_size(policy: Policy, size: int, scaled: bool) -> Policy:
    """The policy with other micro-batches, and with their prompt tokens in proportion where ``scaled``."""
    tokens = policy.prompt_tokens_per_micro_batch
    tokens = math.ceil(tokens * size / policy.gpu_batch_size) if scaled else tokens
    return dataclasses.replace(policy, gpu_batch_size=size, prefill_budget=tokens)


def search_pays(
    seconds: float, rest: Problem, planned: Job, before: EnginePlan, found: EnginePlan | None, pass_seconds: float
) -> bool:
    """Whether a search that takes so long is worth it, where passes have taken ``pass_seconds`` each. Without a block
    ``found`` already, it may gain what the lengths suggest: with sequences half as long as those that the block was
    ``planned`` for, twice as many run at a time."""
    assert before.plan is not None
    policy = before.policy
    on_gpu = min(policy.weights.gpu, policy.cache.gpu, policy.activations.gpu) >= 1
    if on_gpu and before.config.gpu_batch_size is None:
        return False  # only the number of sequences is open: a search took 6 s of a job of 22 s
    longer = rest.job.mean_tokens / planned.mean_tokens
    plan = found.plan if found is not None else estimated(rest, before.plan.hardware, policy)
    share = 1 - min(longer, 1 / longer) if found is None else SEARCH_SHARE
    assert plan is not None
    return seconds <= share * plan.passes * before.deployment.passes_in_flight * pass_seconds


def is_faster(rest: Problem, before: EnginePlan, found: EnginePlan | None) -> bool:
    """Whether ``found`` is, for what is left of a job, by more than a plan is off."""
    assert before.plan is not None
    if found is None or found.plan is None or found.policy == before.policy:
        return False
    as_before = estimated(rest, before.plan.hardware, before.policy).predicted_tokens_per_second
    return found.plan.predicted_tokens_per_second > (1 + LEAST_GAIN) * as_before


def reason(rest: Job, answers: int, before: Policy, found: Policy) -> str:
    """Why another block goes on."""
    return (
        f"sequences have {rest.mean_tokens:.4g} tokens on average by {answers} answers; "
        f"block {before.block_size} -> {found.block_size}"
    )


def faster(searched: EnginePlan, found: EnginePlan | None) -> EnginePlan:
    """The one that promises more; both are priced for the same job."""
    if found is None or found.plan is None or searched.plan is None:
        return searched
    return max(searched, found, key=lambda each: each.plan.predicted_tokens_per_second if each.plan else 0.0)
