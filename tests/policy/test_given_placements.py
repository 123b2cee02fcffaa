"""Placements that the user gives: accepted where whole tensors and sequences fit the budgets, to the byte, and refused
where they do not."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.policy.footprint import peak_memory
from flexbatch.policy.hardware import load_hardware
from flexbatch.policy.optimizer import choose
from flexbatch.policy.plan import DoesNotFit
from flexbatch.policy.policy import TIERS, Constraints, Policy, Split
from flexbatch.policy.shapes import public_shape
from flexbatch.policy.workload import Workload

splits = st.tuples(st.sampled_from([0, 10, 25, 33, 50, 70, 100]), st.sampled_from([0, 10, 25, 50, 100])).map(
    lambda pair: (pair[0], min(pair[1], 100 - pair[0]))
)


@st.composite
def placements(draw):
    """(shape, machine, workload, policy, six percentages)."""
    percent = [float(share) for _ in range(3) for share in draw(splits)]
    policy = Policy(
        *(Split.from_percent(*percent[i : i + 2]) for i in (0, 2, 4)),
        draw(st.sampled_from([1, 3, 8])),
        draw(st.sampled_from([1, 2, 4])),
        weight_bits=draw(st.sampled_from([16, 8, 4])),
        cache_bits=draw(st.sampled_from([16, 4])),
        prefill_chunk=64,
        prefill_budget=draw(st.sampled_from([64, 256])),
    )
    lengths = draw(st.lists(st.tuples(st.integers(5, 400), st.integers(1, 100)), min_size=4, max_size=20))
    machine = load_hardware(draw(st.sampled_from(["h200", "t4", "cpu"])))
    return (
        public_shape(draw(st.sampled_from(["opt-125m", "opt-1.3b"]))),
        machine,
        Workload.from_lengths(*zip(*lengths, strict=True)),
        policy,
        tuple(percent),
    )


def chosen(placement, room, **sizes):
    """Plans with the placement in ``room``; the sizes of the block are open where they are not given."""
    shape, machine, workload, policy, percent = placement
    constraints = Constraints(
        percent=percent,
        cpu_attention=0.0,
        prefill_chunk=policy.prefill_chunk,
        prefill_budget=policy.prefill_budget,
        weight_bits=(policy.weight_bits,),
        cache_bits=(policy.cache_bits,),
        gpu_memory=room["gpu"],
        cpu_memory=room["cpu"],
        disk=room["disk"],
        **sizes,
    )
    return choose(shape, machine, workload, constraints)


def what_fits_is_accepted(placement):
    shape, machine, workload, policy = placement[:4]
    sizes = {"gpu_batch_size": policy.gpu_batch_size, "num_gpu_batches": policy.num_gpu_batches}
    # The sizes of the job's own block: no more micro-batches than it fills.
    free = chosen(placement, dict.fromkeys(TIERS, 2**50), **sizes).policy
    room = {tier: sum(kinds.values()) for tier, kinds in peak_memory(shape, machine, workload, free).items()}
    plan = chosen(placement, room, **sizes)
    assert plan.policy == free and not plan.missing and plan.predicted_tokens_per_second > 0
    for tier in TIERS:
        if room[tier]:
            with pytest.raises(DoesNotFit):
                chosen(placement, {**room, tier: room[tier] - 1}, **sizes)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(placements())
def test_a_placement_is_accepted_exactly_where_it_fits(placement):
    what_fits_is_accepted(placement)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(placements())
def test_a_placement_with_open_sizes_is_accepted_where_one_sequence_fits(placement):
    one_sequence_fits(placement)


def test_a_placement_with_open_sizes_looks_past_the_blocks_that_are_too_large():
    """Fifty of the sizes that are tried do not fit, and all of them would be faster."""
    constraints = Constraints(percent=(20.0, 80.0, 0.0, 100.0, 100.0, 0.0), cpu_attention=1.0, gpu_memory=16 * 2**30)
    plan = choose(public_shape("opt-30b"), load_hardware("h200"), Workload.uniform(512, 32), constraints)
    assert not plan.missing and plan.policy.block_size > 8


def one_sequence_fits(placement):
    shape, machine, workload, policy, _ = placement
    smallest = dataclasses.replace(policy, gpu_batch_size=1, num_gpu_batches=1)
    room = {tier: sum(kinds.values()) for tier, kinds in peak_memory(shape, machine, workload, smallest).items()}
    plan = chosen(placement, room)
    assert not plan.missing and plan.policy.percent == smallest.percent


@pytest.mark.slow
@settings(max_examples=300, deadline=None, derandomize=True)
@given(placements())
def test_many_placements_are_accepted_exactly_where_they_fit(placement):
    what_fits_is_accepted(placement)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True)
@given(placements())
def test_many_placements_with_open_sizes_are_accepted_where_one_sequence_fits(placement):
    one_sequence_fits(placement)
