"""What can change between passes when the measured pass is not the planned one, and what a run teaches about the
machine. Pure functions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexbatch.policy.affine import point_of
from flexbatch.policy.cost import RESOURCES, PassModel
from flexbatch.policy.curve import Curve
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.pass_load import PROMPT_FIELDS, steady_load
from flexbatch.policy.plan import Plan

TOLERANCE = 0.2
"""A pass this far from its plan is planned again."""
SHARES = tuple(i / 20 for i in range(21))
LEAST_GAIN = 0.01
"""Of the average pass: a smaller prompt budget fills the block later, which the average pass does not show."""


@dataclass(frozen=True)
class Replan:
    """New settings between passes; no memory moves. ``reason`` is for the log."""

    admission_limit: int
    """Sequences in flight, at most the block's size."""
    prefill_budget: int
    """Prompt tokens of a micro-batch in one pass."""
    cpu_attention: float
    predicted_pass_seconds: float
    changed: bool
    reason: str


def recalibrate(
    hardware: Hardware, predicted: Mapping[str, float], measured: Mapping[str, float], limit: float = 4.0
) -> Hardware:
    """The machine with its rates scaled by predicted / measured seconds of each resource, by at most ``limit`` either
    way.

    Resources that were predicted or measured at less than 1 % of the busiest say nothing about their rate and are
    left alone.
    """
    least_predicted, least_measured = (0.01 * max(seconds.values(), default=0.0) for seconds in (predicted, measured))
    fields = {
        "h2d": ("h2d", "gather", "h2d_during_cpu_attention"),
        "d2h": ("d2h", "scatter"),
        "disk_read": ("disk_read",),
        "disk_write": ("disk_write",),
        "gpu_compute": (
            "gemm",
            "attention_decode",
            "attention_prefill",
            "prompt_expand_8",
            "prompt_expand_4",
            "expand",
        ),
        "gpu_memory": ("gpu_bandwidth",),
        "cpu_attention": ("cpu_attention", "cpu_attention_during_h2d"),
        "cpu_experts": ("cpu_experts", "cpu_experts_8", "cpu_experts_4"),
        "host_memory": ("host_bandwidth",),
    }
    changes: dict[str, Any] = {}
    for resource, names in fields.items():
        before, after = predicted.get(resource, 0.0), measured.get(resource, 0.0)
        if before <= least_predicted or after <= least_measured:
            continue
        factor = min(limit, max(1 / limit, before / after))
        for name in names:
            if (rate := getattr(hardware, name)) is not None:
                changes[name] = scaled(rate, factor)
    return dataclasses.replace(hardware, **changes)


def scaled(rate: float | Curve, factor: float) -> float | Curve:
    if isinstance(rate, Curve):
        return dataclasses.replace(rate, values=tuple(value * factor for value in rate.values))
    return rate * factor


def replan(
    plan: Plan,
    measured_pass_seconds: float,
    measured: Mapping[str, float],
    mean_context: float | None = None,
    cpu_attention: bool = True,
) -> Replan:
    """Settings for the next passes when a pass takes ``measured_pass_seconds``.

    plan: what was predicted. measured: busy seconds of each resource in that pass. mean_context: tokens that a
    decoding sequence really holds, where the estimate of the lengths was wrong. cpu_attention: whether its share may
    change; there may be no buffers for any. Within ``TOLERANCE`` everything stays. Otherwise the rates are corrected
    by what was measured, and the CPU-attention share and the admission limit with the highest throughput under them
    are taken; memory stays where it is.
    """
    policy = plan.policy
    ratio = measured_pass_seconds / plan.pass_seconds
    budget = policy.prompt_tokens_per_micro_batch
    if abs(ratio - 1) <= TOLERANCE:
        reason = (
            f"pass took {measured_pass_seconds:.3g} s, planned {plan.pass_seconds:.3g} s: within "
            f"{TOLERANCE:.0%}, nothing changes"
        )
        return Replan(policy.block_size, budget, policy.cpu_attention, measured_pass_seconds, False, reason)
    hardware = recalibrate(plan.hardware, plan.resource_seconds, measured)
    limit = admission_limit(plan, mean_context)
    share, seconds = best_share(plan, hardware, limit, mean_context, cpu_attention)
    # The plan was chosen by the whole job, whose block prompts fill sooner with a larger budget; the average pass alone
    # asked for less from the start. So only a budget below what it asked for then is a reason to leave the plan's.
    as_planned = chunk_budget(plan, plan.hardware, limit, share, mean_context)
    best = chunk_budget(plan, hardware, limit, share, mean_context)
    budget = best if best < as_planned else budget
    culprit = max(RESOURCES, key=lambda name: measured.get(name, 0.0) - plan.resource_seconds[name])
    words = [f"pass took {measured_pass_seconds:.3g} s, planned {plan.pass_seconds:.3g} s ({ratio - 1:+.0%})"]
    words.append(f"{culprit} busy {measured.get(culprit, 0.0):.3g} s instead of {plan.resource_seconds[culprit]:.3g} s")
    planned_budget = policy.prompt_tokens_per_micro_batch
    settings = (
        ("admission limit", policy.block_size, limit),
        ("CPU attention", policy.cpu_attention, share),
        ("prompt budget", planned_budget, budget),
    )
    changes = [
        f"{name} {before:.4g} -> {after:.4g}"
        for name, before, after in settings
        if not math.isclose(before, after, rel_tol=1e-3, abs_tol=1e-3)
    ]
    reason = "; ".join([*words, *(changes or ["no setting between passes helps"])])
    return Replan(limit, budget, share, seconds, bool(changes), reason)


def part_without_prompts(plan: Plan) -> dict[str, float]:
    """Of the seconds of each resource in the plan's average pass, the part that it would take without its prompts: all
    that passes without prompts say anything about."""
    load, _ = steady_load(plan.workload, plan.policy)
    prompts = {name: getattr(load, name) * np.array([0.0, 1.0]) for name in PROMPT_FIELDS}
    seconds = plan.passes_like(dataclasses.replace(load, **prompts)).resource_seconds(point_of(plan.policy))
    pairs = {name: np.broadcast_to(seconds[name], 2).tolist() for name in RESOURCES}
    return {name: min(1.0, without / whole) if whole > 0 else 0.0 for name, (without, whole) in pairs.items()}


def admission_limit(plan: Plan, mean_context: float | None) -> int:
    """Fewer sequences where these are longer than planned, so that the cache's tier still holds them; at least one a
    micro-batch."""
    if mean_context is None:
        return plan.policy.block_size
    load, _ = steady_load(plan.workload, plan.policy)
    planned = float(load.decode_context) / max(float(load.decode_sequences), 1e-9)
    sequences = plan.policy.block_size * min(1.0, planned / mean_context)
    return max(plan.policy.num_gpu_batches, math.floor(sequences))


def model_for(
    plan: Plan, hardware: Hardware, limit: int, share: float, mean_context: float | None
) -> tuple[PassModel, np.ndarray]:
    """The steady pass of ``limit`` sequences with the contexts that were met, and the plan's placement with
    ``share`` of CPU attention."""
    policy = dataclasses.replace(plan.policy, cpu_attention=share)
    load, _ = steady_load(plan.workload, plan.policy, in_flight=limit)
    if mean_context is not None:
        load = dataclasses.replace(load, decode_context=float(load.decode_sequences) * mean_context)
    return plan.passes_like(load, hardware, policy), point_of(policy)


def best_share(
    plan: Plan, hardware: Hardware, limit: int, mean_context: float | None, may_change: bool = True
) -> tuple[float, float]:
    """(share of the CPU's sequences to attend there, seconds of the pass). Staging was sized by the plan: the share
    may rise, not fall below it."""
    # Two staging areas hold the planned share of a micro-batch; a smaller share would need larger ones, unless fewer
    # sequences are in flight.
    staged = plan.policy.cache.cpu * (1 - plan.policy.cpu_attention)
    may_be_staged = staged * plan.policy.block_size / limit
    least = max(0.0, 1 - may_be_staged / plan.policy.cache.cpu) if plan.policy.cache.cpu else 0.0
    shares = (
        sorted({plan.policy.cpu_attention, *(share for share in SHARES if share >= least - 1e-9)})
        if plan.policy.cache.cpu and may_change
        else [plan.policy.cpu_attention if plan.policy.cache.cpu else 0.0]
    )
    models = {share: model_for(plan, hardware, limit, share, mean_context) for share in shares}
    seconds = {share: float(model.pass_seconds(point)) for share, (model, point) in models.items()}
    best = min(shares, key=lambda share: (seconds[share], abs(share - plan.policy.cpu_attention)))
    return best, seconds[best]


def chunk_budget(plan: Plan, hardware: Hardware, limit: int, share: float, mean_context: float | None) -> int:
    """The planned budget, or a smaller one that hides more of the prompts under the pass's other traffic; never below
    what keeps the block full.

    A block on the GPU has nothing that prompts could hide under. With 842 instead of 107,773 tokens a pass, 1,000
    prompts of Llama-3-8B took 381 passes instead of 257, most of them with prompts in them and so outside of a graph.
    """
    planned = plan.policy.prompt_tokens_per_micro_batch
    model, point = model_for(plan, hardware, limit, share, mean_context)
    load, batches = model.load, plan.policy.num_gpu_batches
    budgets, paced = [planned], math.ceil(float(load.prompt_tokens) / batches)
    while budgets[-1] > paced:
        budgets.append(max(paced, budgets[-1] // 2))
    # The average pass when its prompts come so many tokens of a micro-batch at a time, and other passes have none.
    bursts = np.array(budgets) * batches / float(load.prompt_tokens)
    prompts = {name: getattr(load, name) * np.array([0.0, *bursts]) for name in PROMPT_FIELDS}
    without, *with_prompts = plan.passes_like(
        dataclasses.replace(load, **prompts), hardware, model.policy
    ).pass_seconds(point)
    seconds = np.array(with_prompts) / bursts + without * (1 - 1 / bursts)
    enough = seconds.min() * (1 + LEAST_GAIN)
    return next(budget for budget, each in zip(budgets, seconds, strict=True) if each <= enough)
