"""How many passes are best from one round of admission to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from flexbatch.policy.affine import point_of
from flexbatch.policy.pass_load import PassLoad
from flexbatch.policy.plan import Plan
from flexbatch.policy.policy import Policy

PASSES = (4, 8, 16)
"""That are compared with 1."""
LEAST_PREMIUM = 0.1
"""Of a decode pass, that one which also reads a prompt of one token takes longer. Offloaded passes take as long either
way: what they wait for is a link."""
LEAST_GAIN = 0.01
"""Of throughput."""


def in_rounds(plan: Plan, priced: Callable[[Policy], Plan]) -> Plan:
    """The plan with the passes between rounds that make it fastest: itself where its block never waits for places, or
    where passes with prompts take no longer than others by much. priced: the plan of another policy for the same
    job."""
    policy = dataclasses.replace(plan.policy, admission_passes=1)
    plan = plan if plan.policy == policy else priced(policy)
    if plan.waves is None or plan.waves < 2 or plan.shape.stages > 1 or premium(plan) < LEAST_PREMIUM:
        return plan
    plans = [priced(dataclasses.replace(policy, admission_passes=passes)) for passes in PASSES]
    best = max(plans, key=lambda each: each.predicted_tokens_per_second)
    return best if best.predicted_tokens_per_second > (1 + LEAST_GAIN) * plan.predicted_tokens_per_second else plan


def premium(plan: Plan) -> float:
    """Of a decode pass of the fullest block, what reading a single prompt token beside adds."""
    sequences = plan.most_in_flight
    context = sequences * (plan.workload.mean_prompt + plan.workload.mean_output / 2)
    decoding = PassLoad(sequences, context)
    both = PassLoad.together([decoding, decoding + PassLoad.prefill(1, 1, 0, True)])
    alone, beside = plan.passes_like(both).pass_seconds(point_of(plan.policy)).tolist()
    return float(beside / alone - 1)
