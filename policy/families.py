"""The discrete choices around the linear program: bits, the tiers of the cache, shares of CPU attention, chunks."""

from __future__ import annotations

import dataclasses
import itertools
import math

from flexbatch.policy.bound import MachineBound, machine_bound
from flexbatch.policy.limits import MAX_PREFILL_CHUNK, PAGE_TOKENS
from flexbatch.policy.lp import fixed_fractions
from flexbatch.policy.policy import Constraints, Policy, Split
from flexbatch.policy.search import Search
from flexbatch.policy.workload import Workload

BOUNDLESS = 2**50


def attention_shares(constraints: Constraints) -> tuple[float, ...]:
    """What a searched policy has for CPU attention: the user's share, or once some, which the program finds, and
    once none."""
    return (1.0, 0.0) if constraints.cpu_attention is None else (constraints.cpu_attention,)


def cpu_shares(search: Search) -> list[tuple[float, float]]:
    """Those of CPU attention with those of the CPU's experts. Without attention experts need working memory of their
    own, so that a plan without them is looked for as well."""
    given, experts = search.constraints.cpu_experts, search.shape.experts is not None
    measured = search.hardware.cpu_experts is not None
    found = []
    for attention in attention_shares(search.constraints):
        shares = (given,) if given is not None else (1.0, 0.0) if experts and measured else (0.0,)
        found += [(attention, share) for share in (shares[:1] if attention else shares)]
    return found


def cache_placements(constraints: Constraints) -> tuple[Split, ...]:
    """What a searched policy has for its cache: once none of it may be on the disk, and once some, which the program
    finds; as far as the user's percentages leave open. The first sequence there takes host memory to stop over, as
    much as a micro-batch of them."""
    on_disk = fixed_fractions(constraints).get("cache_disk")
    return (
        (Split(1.0, 0.0), Split(0.0, 0.0, 1.0))
        if on_disk is None
        else (Split(0.0, 0.0, 1.0),)
        if on_disk
        else (Split(1.0, 0.0),)
    )


def chunk_of(workload: Workload, constraints: Constraints) -> int:
    """The user's chunk, or whole prompts up to MAX_PREFILL_CHUNK tokens."""
    if constraints.prefill_chunk is not None:
        return constraints.prefill_chunk
    longest = workload.longest_prompt
    return min(MAX_PREFILL_CHUNK, math.ceil(longest / PAGE_TOKENS) * PAGE_TOKENS)


def templates(workload: Workload, constraints: Constraints) -> list[Policy]:
    """Bits that the constraints leave open, sizes and splits still to be found."""
    anywhere = Split(1.0, 0.0)
    plain = Policy(
        anywhere,
        anywhere,
        anywhere,
        1,
        1,
        prefill_chunk=chunk_of(workload, constraints),
        overlap=constraints.overlap,
        async_scheduling=constraints.async_scheduling,
        piece_tokens=constraints.piece_tokens,
    )
    return [
        dataclasses.replace(plain, weight_bits=weight_bits, cache_bits=cache_bits)
        for weight_bits, cache_bits in itertools.product(constraints.weight_bits, constraints.cache_bits)
    ]


def families(search: Search) -> list[tuple[MachineBound, Policy]]:
    """A template of each family of policies (see `search.family_of`) with the machine's bound for it."""
    found = []
    for template in templates(search.workload, search.constraints):
        bits = template.weight_bits, template.cache_bits
        bound = machine_bound(search.shape, search.hardware, search.workload, search.constraints, *bits)
        if bound is None and search.placement_given:
            # Whole tensors may meet the percentages with less on a tier than these say; the exact sizes will tell.
            boundless = search.hardware.with_memory(BOUNDLESS, BOUNDLESS, BOUNDLESS)
            bound = machine_bound(search.shape, boundless, search.workload, search.constraints, *bits)
        if bound is not None:
            kinds = itertools.product(cache_placements(search.constraints), cpu_shares(search))
            found += [
                (bound, dataclasses.replace(template, cache=cache, cpu_attention=attention, cpu_experts=experts))
                for cache, (attention, experts) in kinds
            ]
    return found
