"""Loads of passes: the steady state, a job walked pass by pass, and the fluid between them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.policy.pass_load import Lengths, PassLoad, job_phases, reserved_tokens, steady_load, trajectory
from flexbatch.policy.policy import Policy, Split
from flexbatch.policy.workload import Workload

ONE = Split(1, 0)


def block(batch: int, count: int, **more) -> Policy:
    return Policy(ONE, ONE, ONE, batch, count, **more)


def test_one_block_of_equal_sequences():
    loads, counts = trajectory(Workload.uniform(512, 32, 144), block(48, 3))
    assert loads.size == 32 and counts.sum() == 32
    assert loads.prompt_tokens[0] == 144 * 512 and loads.prompt_tokens[1:].sum() == 0
    assert loads.decode_sequences[1:].tolist() == [144] * 31
    assert loads.decode_context[1] == 144 * 513 and loads.decode_context[-1] == 144 * 543


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
    loads, counts = trajectory(workload, policy)
    walked = min(sequences, 4 * policy.block_size)
    tokens = np.sum(loads.prompt_tokens)
    expected = sum(pairs[i % 2][0] for i in range(walked))
    assert tokens == expected
    assert np.sum(loads.finished_prompts) == walked
    assert np.sum(loads.decode_sequences) == walked * (output - 1)
    assert np.all(loads.prompt_tokens <= count * policy.prompt_tokens_per_micro_batch)
    assert np.all(loads.decode_sequences <= policy.block_size)
    assert np.sum(counts * loads.finished_prompts) == pytest.approx(sequences, rel=0.3, abs=2)


@pytest.mark.parametrize("budget", [0, 256, 512, 2048])
@pytest.mark.parametrize("sequences", [16, 64, 400])
def test_fluid_follows_the_walk(sequences, budget):
    workload, policy = Workload.uniform(512, 64, sequences), block(16, 2, prefill_budget=budget)
    loads, counts = trajectory(workload, policy)
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
