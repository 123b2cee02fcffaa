"""Loads of passes: the steady state, a job walked pass by pass, and the fluid between them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.policy.pass_load import Lengths, PassLoad, job_phases, reserved_tokens, steady_load
from flexbatch.policy.policy import Policy, Split
from flexbatch.policy.trajectory import WALKED, passes_of
from flexbatch.policy.workload import Workload, by_total

ONE = Split(1, 0)


def block(batch: int, count: int, **more) -> Policy:
    return Policy(ONE, ONE, ONE, batch, count, **more)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=60),
    st.sampled_from([0.0, 0.5, 2.0**40]),
)
def test_lengths_are_ordered_by_their_sum(pairs, more):
    """Whole numbers, and others: means of merged lengths, or so large ones that no key holds both."""
    columns = np.array(pairs, dtype=float).T + more
    assert by_total(columns).T.tolist() == sorted(columns.T.tolist(), key=lambda pair: (sum(pair), *pair))


def test_one_block_of_equal_sequences():
    passes = passes_of(Workload.uniform(512, 32, 144), block(48, 3, prefill_budget=48 * 512))
    loads, counts = passes.load, passes.counts
    assert counts.tolist() == [1, 31] and passes.tail_passes == 0
    assert loads.prompt_tokens.tolist() == [144 * 512, 0]
    assert loads.decode_sequences.tolist() == [0, 144]
    assert loads.decode_context[1] == 144 * (513 + 543) / 2


def test_a_small_last_wave_takes_as_many_passes_as_the_others():
    """184 sequences by 87 leave 10, by 92 none."""
    workload = Workload.uniform(512, 32, 184)
    three, two = (passes_of(workload, block(size, 1, prefill_budget=92 * 512)) for size in (87, 92))
    assert (three.counts.sum(), two.counts.sum()) == (96, 64)
    assert (three.tail_passes, three.tail_sequences, two.tail_passes) == (32, 10, 0)
    for size, expected in ((87, 96), (92, 64)):
        phases = job_phases(workload, block(size, 1, prefill_budget=92 * 512))
        assert sum(count for _, count in phases) == pytest.approx(expected, rel=0.02)


def test_a_long_job_is_walked_in_part_and_counted_whole():
    """Of a job whose passes are counted one by one, the part that stands for it takes about as many."""
    rng = np.random.default_rng(5)
    workload = Workload.from_lengths(rng.integers(20, 900, 6000), rng.integers(1, 200, 6000))
    assert workload.num_sequences > WALKED
    for policy in (block(300, 1), block(20, 4, prefill_budget=512), block(64, 1), block(3, 1)):
        whole, part = passes_of(workload, policy), passes_of(workload, policy, exact=False)
        assert part.counts.sum() == pytest.approx(whole.counts.sum(), rel=0.1)
        for name in ("prompt_tokens", "decode_sequences", "decode_context"):
            totals = [float(np.sum(each.counts * getattr(each.load, name))) for each in (whole, part)]
            assert totals[1] == pytest.approx(totals[0], rel=0.05), name


def test_steady_state_by_hand():
    load, finished = steady_load(Workload.uniform(512, 32), block(16, 2))
    assert finished == pytest.approx(1.0)
    assert load.prompt_tokens == pytest.approx(512)
    assert load.decode_sequences == pytest.approx(31)
    assert load.decode_context == pytest.approx(sum(range(513, 544)))


def test_chunks_of_a_prompt():
    lengths = Lengths.of(Workload.uniform(1000, 2), block(1, 1, prefill_chunk=256))
    assert lengths.prompt_passes == 4
    assert lengths.prompt_pairs == sum(range(1, 1001))
    assert lengths.prompt_context == 256 + 512 + 768


def test_reserved_slots_are_full_pages():
    assert reserved_tokens(Workload.uniform(500, 30), block(4, 1)) == 544
    assert reserved_tokens(Workload.uniform(500, 44), block(4, 1)) == 544
    assert reserved_tokens(Workload.uniform(500, 45), block(4, 1)) == 560


def test_long_sequences_are_met_more_often():
    mixed = Workload(((100, 10), (100, 1000)))
    assert reserved_tokens(mixed, block(8, 1)) > 1000
    short_job = Workload(((100, 10), (100, 1000)), num_sequences=8)
    assert reserved_tokens(short_job, block(8, 1)) == pytest.approx((112 + 1104) / 2)


@settings(max_examples=40, deadline=None)
@given(
    prompt=st.integers(1, 900), output=st.integers(1, 60), spread=st.floats(0, 0.9), sequences=st.integers(1, 120),
    batch=st.integers(1, 12), count=st.integers(1, 4),
    chunk=st.sampled_from([64, 512]), budget=st.sampled_from([0, 64, 700]),
)  # fmt: skip
def test_a_job_loses_and_repeats_nothing(prompt, output, spread, sequences, batch, count, chunk, budget):
    pairs = ((float(prompt), float(output)), (max(1.0, prompt * (1 - spread) // 1), float(output)))
    workload, policy = Workload(pairs, sequences), block(batch, count, prefill_chunk=chunk, prefill_budget=budget)
    passes = passes_of(workload, policy)
    loads, counts = passes.load, passes.counts
    assert np.sum(counts * loads.prompt_tokens) == sum(request.prompt for request in workload.requests)
    assert np.sum(counts * loads.finished_prompts) == sequences
    assert np.sum(counts * loads.decode_sequences) == sequences * (output - 1)
    # One token of a prompt rides along whatever the budget is.
    limit = count * policy.prompt_tokens_per_micro_batch + policy.block_size
    assert np.all(loads.prompt_tokens <= limit)
    assert np.all(loads.decode_sequences <= policy.block_size) and np.all(passes.in_flight <= policy.block_size)


@pytest.mark.parametrize("budget", [0, 256, 512, 2048])
@pytest.mark.parametrize("sequences", [16, 64, 400])
def test_fluid_follows_the_walk(sequences, budget):
    workload, policy = Workload.uniform(512, 64, sequences), block(16, 2, prefill_budget=budget)
    passes = passes_of(workload, policy)
    loads, counts = passes.load, passes.counts
    phases = job_phases(workload, policy)
    assert sum(count for _, count in phases) == pytest.approx(counts.sum(), rel=0.1)
    assert sum(count * load.prompt_tokens for load, count in phases) == pytest.approx(
        float(np.sum(counts * loads.prompt_tokens)), rel=0.05
    )
    assert sum(count * load.decode_sequences for load, count in phases) == pytest.approx(
        float(np.sum(counts * loads.decode_sequences)), rel=0.1
    )


def test_merged_lengths_keep_their_sums():
    rng = np.random.default_rng(3)
    prompts, outputs = rng.integers(1, 2000, 1000), rng.integers(1, 300, 1000)
    workload = Workload.from_lengths(prompts.tolist(), outputs.tolist())
    assert workload.num_sequences == 1000 and len(workload.lengths) == Workload.MAX_PAIRS
    assert np.mean([p for p, _ in workload.lengths]) == pytest.approx(prompts.mean(), rel=0.01)


def test_loads_add_and_scale():
    total = (PassLoad.decode(4, 100) + PassLoad.prefill(2, 50, before=10)).scaled(2)
    assert (total.decode_context, total.prompt_tokens, total.prompt_context, total.finished_prompts) == (
        800,
        200,
        40,
        4,
    )
    assert total.prompt_pairs == 2 * 2 * sum(range(11, 61))


def test_a_likely_answer_never_asks_for_more_pages_than_a_block_of_one_has():
    """The longest prompt has a short answer: with a likely one it would take a page more than the pools were made for,
    and no request was admitted any more."""
    given = Workload.from_lengths(np.array([56, 67, 50]), np.array([64, 42, 64]))
    policy = Policy(Split(0, 0, 1), Split(0, 1, 0), Split(1, 0, 0), 1, 1, prefill_chunk=80, prefill_budget=32)
    found = passes_of(dataclasses.replace(given, grows=True), policy)
    assert found.counts.sum() >= 64 + 42 + 64
