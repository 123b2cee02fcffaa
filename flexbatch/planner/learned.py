"""Whether another block is worth it for what is left of a job, now that its answers are not as long as assumed."""

from __future__ import annotations

from flexbatch.execution.job import Job
from flexbatch.planner.choose import priced
from flexbatch.planner.engine_plan import EnginePlan
from flexbatch.planner.problem import Problem
from flexbatch.policy.policy import Policy

LEAST_GAIN = 0.1
"""Of throughput, that another block must promise before sequences in flight are read anew for it."""


def most_saved(rest: Problem, planned: Job, before: EnginePlan, pass_seconds: float) -> float:
    """Seconds that another block saves of what is left at most, where passes have taken ``pass_seconds`` each: with
    sequences half as long as those it was ``planned`` for, twice as many run at a time."""
    assert before.plan is not None
    passes = before.deployment.passes_in_flight * priced(rest, before.plan.hardware, before.policy).passes
    longer = rest.job.mean_tokens / planned.mean_tokens
    return passes * pass_seconds * (1 - min(longer, 1 / longer))


def is_faster(rest: Problem, before: EnginePlan, found: EnginePlan) -> bool:
    """Whether ``found`` is, for what is left of a job, by more than a plan is off."""
    assert before.plan is not None
    if found.plan is None or found.policy == before.policy:
        return False
    as_before = priced(rest, before.plan.hardware, before.policy).predicted_tokens_per_second
    return found.plan.predicted_tokens_per_second > (1 + LEAST_GAIN) * as_before


def reason(rest: Job, answers: int, before: Policy, found: Policy) -> str:
    """Why another block goes on."""
    return (
        f"sequences have {rest.mean_tokens:.4g} tokens on average by {answers} answers; "
        f"block {before.block_size} -> {found.block_size}"
    )
