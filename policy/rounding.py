"""From a point of the linear program to a policy of whole tensors and sequences, and the refusal when there is none."""

from __future__ import annotations

import dataclasses

import numpy as np

from flexbatch.policy.affine import KINDS, VARIABLES
from flexbatch.policy.footprint import capacity, memory_rows, round_cache, spread_weights
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.lp import fixed_fractions, least_shortage
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.plan import DoesNotFit
from flexbatch.policy.policy import TIERS, Constraints, Policy, Split
from flexbatch.policy.shortage import shortage_text
from flexbatch.policy.workload import Workload

NOISE = 1e-6


def clean(fractions: np.ndarray) -> Split:
    """Without the solver's noise."""
    kept = np.where(np.asarray(fractions) < NOISE, 0.0, fractions)
    return Split(*(float(x) for x in kept / kept.sum()))


def placed(shape: ModelShape, policy: Policy, point: np.ndarray, constraints: Constraints) -> Policy:
    """``policy`` with the splits of ``point``, as whole tensors and sequences can meet them; a split that the user
    gave stays as given."""
    fixed = fixed_fractions(constraints)
    splits = {kind: clean(point[1 + 3 * i : 4 + 3 * i]) for i, kind in enumerate(KINDS)}

    def share(name: str, kind: str, given: float | None) -> float:
        there = splits[kind].cpu
        found = min(1.0, float(point[1 + VARIABLES.index(name)]) / there) if there else 0.0
        found = found if given is None else given
        return found if found > NOISE else 0.0

    policy = dataclasses.replace(
        policy,
        weights=splits["weights"],
        cache=splits["cache"],
        activations=splits["activations"],
        cpu_attention=share("cpu_attention", "cache", constraints.cpu_attention),
        cpu_experts=share("cpu_experts", "weights", constraints.cpu_experts),
    )
    if not any(name.startswith("weights") for name in fixed):
        policy = dataclasses.replace(policy, weights=spread_weights(shape, policy.weights, policy.weight_bits)[0])
    if not any(name.startswith("cache") for name in fixed):
        policy = dataclasses.replace(policy, cache=round_cache(policy))
    return policy


def does_not_fit(
    shape: ModelShape, hardware: Hardware, workload: Workload, constraints: Constraints, policy: Policy
) -> DoesNotFit:
    """The refusal for the smallest block that was allowed, placed so that as little as possible is missing."""
    rows = memory_rows(shape, hardware, workload, policy)
    budgets = capacity(hardware)
    point = least_shortage(
        {tier: np.sum(list(kinds.values()), axis=0) for tier, kinds in rows.items()}, budgets, constraints
    )
    sizes = (
        f"micro-batch {policy.gpu_batch_size} x {policy.num_gpu_batches}, weights at {policy.weight_bits} "
        f"bits, cache at {policy.cache_bits}"
    )
    kinds = list(dict.fromkeys(kind for tier in TIERS for kind in rows[tier]))
    need = {
        kind: {tier: float(rows[tier][kind] @ point) if kind in rows[tier] else 0.0 for tier in TIERS} for kind in kinds
    }
    text = shortage_text(
        f"{shape.name} does not fit: {sizes}",
        need,
        budgets,
        percent=constraints.percent is not None,
        smaller_block=policy.block_size > 1,
        fewer_bits=min(constraints.weight_bits) == 16,
    )
    return DoesNotFit(text)
