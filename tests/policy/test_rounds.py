"""A full block lets others in at once, or several after a number of passes, whichever is faster."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest

from flexbatch.policy.hardware import load_hardware
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.plan import Plan, price
from flexbatch.policy.policy import Policy, Split
from flexbatch.policy.round_choice import in_rounds, premium
from flexbatch.policy.rounds import PARTS, Rounds
from flexbatch.policy.shapes import public_shape
from flexbatch.policy.walk import walk
from flexbatch.policy.workload import RequestLengths, Workload

ON_GPU = Policy(Split(1, 0), Split(1, 0), Split(1, 0), 64, 1, prefill_chunk=64, prefill_budget=512, piece_tokens=2048)
LLAMA_3_8B = public_shape("llama-3-8b")
MACHINE = dataclasses.replace(load_hardware("h200"), piece_seconds=4e-4)


def test_nobody_waits_before_a_round_has_filled_the_block() -> None:
    rounds = Rounds(8)
    assert not rounds.waits(0) and not rounds.waits(100)
    rounds.now = 5
    rounds.filled(64)
    assert rounds.waits(63) and rounds.left(63) == 8
    assert not rounds.waits(64 - 64 // PARTS), "many ended together"
    rounds.now = 12
    assert rounds.waits(63) and rounds.left(63) == 1
    rounds.now = 13
    assert not rounds.waits(63) and rounds.left(63) == float("inf")


@pytest.mark.parametrize("running", range(1, 20))
def test_a_block_never_waits_empty_nor_for_a_single_place_of_few(running: int) -> None:
    rounds = Rounds(1000)
    rounds.filled(running)
    assert not rounds.waits(0) and not rounds.waits(running - max(1, running // PARTS))
    one_by_one = Rounds(1)
    one_by_one.filled(running)
    assert not one_by_one.waits(running)


def test_those_that_wait_come_with_the_next_round_though_nobody_ends_before_it() -> None:
    """Of 16 one ends in the third pass; the next in line has its place from the eleventh on, and all others go on."""
    requests = [RequestLengths.of(1, 3 if i == 5 else 100) for i in range(16)] + [RequestLengths.of(7, 5)]
    policy = dataclasses.replace(ON_GPU, gpu_batch_size=16, admission_passes=10)
    found = walk(requests, policy)
    begins = [int(pass_) for pass_ in np.cumsum(found.counts) - found.counts]
    assert [at for at, tokens in zip(begins, found.load.prompt_tokens, strict=True) if tokens] == [0, 10]
    assert found.passes == 100


@pytest.mark.parametrize("seed", range(20))
def test_passes_between_rounds_change_no_work(seed: int) -> None:
    """Every token is read and generated once; fewer passes bring prompts, and not many more are taken in all."""
    chance = random.Random(seed)
    requests = [RequestLengths.of(chance.randint(2, 60), chance.expovariate(1 / 120) + 1) for _ in range(400)]
    found = {passes: walk(requests, dataclasses.replace(ON_GPU, admission_passes=passes)) for passes in (1, 8)}
    sums = [
        (float((each.counts * each.load.prompt_tokens).sum()), float((each.counts * each.load.decode_sequences).sum()))
        for each in found.values()
    ]
    assert sums[0] == sums[1]
    reading = [float(each.counts[each.load.prompt_tokens > 0].sum()) for each in found.values()]
    assert reading[1] < 0.5 * reading[0]
    assert found[8].passes < 1.15 * found[1].passes


def planned(shape: ModelShape, outputs: list[int], policy: Policy = ON_GPU, **machine: Any) -> Plan:
    workload = Workload.from_lengths([40] * len(outputs), outputs)
    hardware = dataclasses.replace(MACHINE, **machine)
    return in_rounds(price(shape, hardware, workload, policy), lambda other: price(shape, hardware, workload, other))


def test_a_block_is_filled_in_rounds_where_that_is_faster() -> None:
    """Answers of their own lengths on a GPU whose host takes long to launch; not where all end together, where the
    whole job runs at a time, where pieces cost no more than graphs, and not where a link decides about every pass."""
    chance = random.Random(1)
    ragged = [1 + int(chance.expovariate(1 / 120)) for _ in range(600)]
    found = planned(LLAMA_3_8B, ragged)
    assert found.policy.admission_passes > 1 and premium(found) > 0.5
    plain = price(LLAMA_3_8B, MACHINE, found.workload, ON_GPU)
    assert found.predicted_tokens_per_second > 1.1 * plain.predicted_tokens_per_second
    assert planned(LLAMA_3_8B, [120] * 600).policy.admission_passes == 1
    assert planned(LLAMA_3_8B, ragged[:60]).policy.admission_passes == 1
    assert planned(LLAMA_3_8B, ragged, piece_seconds=1e-9, graph_seconds=0.0).policy.admission_passes == 1
    streamed = dataclasses.replace(ON_GPU, weights=Split(0.2, 0.8))
    assert planned(LLAMA_3_8B, ragged, streamed).policy.admission_passes == 1
