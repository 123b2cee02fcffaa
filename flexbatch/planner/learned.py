"""Another block for what is left of a job, now that its answers are not as long as assumed.

Passes wait for whatever is decided here. So the block in flight is first made larger or smaller as it is, every split
where it was, which takes a few milliseconds; a search among all placements, which takes seconds, is for jobs that go on
for long enough.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable
from functools import partial

from flexbatch.execution.job import Job
from flexbatch.planner.choose import counting_graphs, priced
from flexbatch.planner.engine_plan import EnginePlan
from flexbatch.planner.placements import overshoot
from flexbatch.planner.problem import Problem
from flexbatch.policy.admission import CacheSizes
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.limits import RESERVED_DEVIATIONS
from flexbatch.policy.plan import Plan
from flexbatch.policy.policy import Policy
from flexbatch.policy.round_choice import in_rounds

LEAST_GAIN = 0.1
"""Of throughput, that another block must promise before sequences in flight are read anew for it."""
LEAST_GAIN_IN_PLACE = 0.02
"""The same where the block goes on as it is, with more sequences."""
GROWTHS = (4, 2)
"""Times as many sequences that a block has buffers for which is made while lengths are learned, where these cost no
more than `GROWTH_COST` of its throughput: the first answers of a job are its short ones, and how long the others are is
estimated with care. A block of 800 answers of Llama-3-8B on an H100 had 34, 63, 75, 103 and 176 sequences; made anew
each time, it read 30,000 tokens twice."""
GROWTH_COST = 0.05
SEARCH_SHARE = 0.05
"""Of the time that is left, that a search may take where a block of another size is there without one. Two searches in
the middle of a job of 110 s on an H200 took 30 s of it, all that twice as many sequences in flight had gained."""


LIKELY_SEARCH = 10.0
"""Times as long as the last search, which was for a job whose answers nothing was known of: pages are estimated anew in
every pass of a walk. Of 200 answers that took a CPU 6 s a search of 15 s came in the middle, where the first had taken
1.2."""


def resized(rest: Problem, before: EnginePlan, job: Job, held: CacheSizes | None = None) -> EnginePlan | None:
    """The block ``before`` with as many sequences of what is left as the budgets hold, and everything where it was;
    None where the user fixed their number, or not one fits. Its micro-batches read as many prompt tokens in a pass as
    they did, or as many for each sequence, whichever is faster: buffers for these take memory from the cache.

    held: pages that the block has, where it may grow as it is. Nothing is read anew then and no graph recorded, so that
    a block which needs other memory has to promise more than a plan is off.
    """
    if before.config.gpu_batch_size is not None:
        return None
    assert before.plan is not None
    machine, most = before.plan.hardware, math.ceil(rest.job.num_requests / before.policy.num_gpu_batches)

    def exceeds(plan: EnginePlan) -> bool:
        with_graphs = counting_graphs(rest, machine, lambda policy: plan.without_graphs(plan.sizes(job)))
        return bool(overshoot(with_graphs(plan.made_for), rest.budgets))

    def sized(scaled: bool, growth: int, size: int) -> EnginePlan:
        policy, grown = of_size(before.policy, size, scaled), min(most, growth * size)
        return dataclasses.replace(before, policy=policy, most=grown if grown > size else 0)

    def made_anew(growth: int) -> EnginePlan | None:
        found: EnginePlan | None = None
        for scaled in (False, True):
            if (anew := largest(most, partial(sized, scaled, growth), exceeds)) is not None:
                found = faster(dataclasses.replace(anew, plan=estimated(rest, machine, anew.policy)), found)
        return found

    if (plain := made_anew(1)) is None:
        return None
    if held is not None and before.most:
        grown = largest(
            min(most, before.most),
            lambda size: dataclasses.replace(before, policy=of_size(before.policy, size, False)),
            lambda plan: not held.covers(plan.sizes(job).cache),
        )
        if grown is not None:
            grown = dataclasses.replace(grown, plan=estimated(rest, machine, grown.policy))
            if not gains(plain, grown):
                return grown
    for growth in GROWTHS if grows(before) else ():
        found = made_anew(growth)
        if found is not None and not gains(plain, found, GROWTH_COST):
            return found
    return plain


def refilled_in_rounds(rest: Problem, found: EnginePlan | None) -> EnginePlan | None:
    """With the passes between rounds of admission that make it fastest for what is left of a job."""
    if found is None or found.plan is None:
        return found
    machine = found.plan.hardware
    plan = in_rounds(found.plan, lambda policy: estimated(rest, machine, policy))
    policy = dataclasses.replace(found.policy, admission_passes=plan.policy.admission_passes)
    return dataclasses.replace(found, policy=policy, plan=plan)


def largest(most: int, make: Callable[[int], EnginePlan], exceeds: Callable[[EnginePlan], bool]) -> EnginePlan | None:
    """Of the plans for 1 to ``most`` sequences of a micro-batch the last that does not exceed what there is."""
    size = bisect.bisect_left(range(1, most + 1), True, key=lambda size: exceeds(make(size)))
    return make(size) if size else None


def grows(plan: EnginePlan) -> bool:
    """Whether its block can have more sequences by and by: nothing but buffers depends on their number."""
    return plan.policy.cache.gpu >= 1 and plan.policy.activations.gpu >= 1 and plan.speculation is None


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
    if rest.job.likely_tokens and not planned.likely_tokens:
        seconds *= LIKELY_SEARCH
    longer = rest.job.mean_tokens / planned.mean_tokens
    plan = found.plan if found is not None else estimated(rest, before.plan.hardware, policy)
    share = 1 - min(longer, 1 / longer) if found is None else SEARCH_SHARE
    assert plan is not None
    return seconds <= share * plan.passes * before.deployment.passes_in_flight * pass_seconds


def holds_more(before: EnginePlan, planned: Job, rest: Job) -> bool:
    """Whether a block that can grow as it is has pages for more sequences of what is left of a job than of the one that
    it was ``planned`` for. The mean answer may be as long as before: of the first answers of a job those that are long
    have not ended, and are taken to reach their limit. By 256 answers of 120 tokens a block had 146 sequences, by all
    of them 210, and means differed by 3 %."""
    if not before.most or not rest.likely_tokens or before.policy.gpu_batch_size >= before.most:
        return False
    block = before.policy.block_size
    then, now = (job.rows_to_reserve(block, RESERVED_DEVIATIONS)[-1] for job in (planned, rest))
    return block < rest.num_requests and now < (1 - LEAST_GAIN_IN_PLACE) * then


def is_faster(rest: Problem, before: EnginePlan, found: EnginePlan | None) -> bool:
    """Whether ``found`` is, for what is left of a job, by more than a plan is off."""
    assert before.plan is not None
    if found is None or found.plan is None or found.policy == before.policy:
        return False
    least = LEAST_GAIN_IN_PLACE if before.most and found.made_for == before.made_for else LEAST_GAIN
    return gains(found, dataclasses.replace(before, plan=estimated(rest, before.plan.hardware, before.policy)), least)


def gains(found: EnginePlan, other: EnginePlan, least: float = LEAST_GAIN) -> bool:
    """Whether it promises more than another plan for the same job, by more than a plan is off."""
    assert found.plan is not None and other.plan is not None
    rate, than = found.plan.predicted_tokens_per_second, other.plan.predicted_tokens_per_second
    return rate > (1 + least) * than


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
