"""The linear program against another algorithm and brute force; what the search chooses, and what it refuses."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from flexbatch.policy.affine import KINDS, VARIABLES
from flexbatch.policy.bound import machine_bound
from flexbatch.policy.cost import PassModel
from flexbatch.policy.footprint import capacity, memory_rows, peak_memory, shortfall
from flexbatch.policy.hardware import load_hardware
from flexbatch.policy.lower_bound import Duals
from flexbatch.policy.lp import StageTimes, solve
from flexbatch.policy.optimizer import choose
from flexbatch.policy.pass_load import PassLoad, steady_load
from flexbatch.policy.plan import DoesNotFit, price
from flexbatch.policy.policy import Constraints, Policy, Split
from flexbatch.policy.search import Search, family_of
from flexbatch.policy.shapes import public_shape
from flexbatch.policy.shared_host import shared_by
from flexbatch.policy.workload import Workload

GIB = 2**30
RARE = [("opt-30b", 16, 64, 1), ("opt-6.7b", 16, 32, 1), ("opt-30b", 80, 128, 1), ("opt-30b", 24, 20, 1)]
MACHINES = [("opt-30b", 16, 64, 2), *RARE]
"""Model, GiB of the gpu and of the cpu tier, and of how many neighbors one is tried."""
WORKLOAD = Workload.uniform(512, 32)


@functools.cache
def chosen(model, machine, gpu=None, cpu=None):
    """Returns the plan for ``WORKLOAD``, searched for once: the search is a function of its arguments."""
    room = {tier: size * GIB for tier, size in (("gpu", gpu), ("cpu", cpu)) if size is not None}
    return choose(public_shape(model), load_hardware(machine).with_memory(**room), WORKLOAD)


def instance(model="opt-30b", machine="h200", gpu=16, cpu=96, batch=24, count=3, bits=(16, 16)):
    hardware = load_hardware(machine).with_memory(gpu=gpu * GIB, cpu=cpu * GIB)
    shape, one = public_shape(model), Split(1, 0)
    policy = Policy(one, one, one, batch, count, *bits, prefill_budget=512)
    load, _ = steady_load(WORKLOAD, policy)
    model = PassModel(shape, hardware, policy, PassLoad.together([load]))
    memory = {
        tier: np.sum(list(kinds.values()), axis=0)
        for tier, kinds in memory_rows(shape, hardware, WORKLOAD, policy).items()
    }
    return hardware, policy, model, memory


INSTANCES = [
    {},
    {"gpu": 40},
    {"machine": "t4", "cpu": 204, "batch": 48},
    {"model": "opt-175b", "machine": "t4", "cpu": 204, "batch": 32, "count": 8},
    {"model": "llama-3-70b", "bits": (4, 4), "batch": 64},
    {"model": "opt-6.7b", "gpu": 20, "cpu": 16, "batch": 16, "count": 1},
]


def by_interior_points(times, memory, room) -> float:
    """The same program, written down a second time for another algorithm: interior points instead of the simplex
    method."""
    stages = [(weight, times.rows[index]) for index, weight in np.ndenumerate(times.weights)]
    n = len(VARIABLES)
    cost = np.r_[np.zeros(n), [weight for weight, _ in stages]]
    upper, limits = [], []
    for i, (_, rows) in enumerate(stages):
        for row in rows:
            stage = np.zeros(len(stages))
            stage[i] = -1
            upper.append(np.r_[row[1:], stage])
            limits.append(-row[0])
    for tier, row in memory.items():
        upper.append(np.r_[row[1:] / GIB, np.zeros(len(stages))])
        limits.append((room[tier] - row[0]) / GIB)
    attended = np.zeros(n + len(stages))
    attended[VARIABLES.index("cpu_attention")], attended[VARIABLES.index("cache_cpu")] = 1, -1
    sums = [np.r_[[float(name.startswith(kind)) for name in VARIABLES], np.zeros(len(stages))] for kind in KINDS]
    result = linprog(
        cost,
        np.array([*upper, attended]),
        [*limits, 0.0],
        np.array(sums),
        np.ones(3),
        [(0, 1)] * n + [(0, None)] * len(stages),
        "highs-ipm",
    )
    assert result.status == 0
    return times.constant + result.fun


@pytest.mark.parametrize("options", INSTANCES)
def test_program_agrees_with_interior_points(options):
    hardware, _, model, memory = instance(**options)
    times = StageTimes.of(model, 1.0)
    found = solve(times, memory, capacity(hardware), Constraints())
    assert found is not None
    assert found.seconds == pytest.approx(by_interior_points(times, memory, capacity(hardware)), rel=1e-4)
    # What the program promises is what the cost model says of its point, but for launching: it cannot know how much of
    # that a placement hides.
    assert float(np.sum(model.busy_seconds(found.point))) == pytest.approx(found.seconds - times.constant, rel=1e-4)


@pytest.mark.parametrize("options", INSTANCES[:4])
def test_no_grid_point_is_better(options):
    hardware, _, model, memory = instance(**options)
    room = capacity(hardware)
    found = solve(StageTimes.of(model, 1.0), memory, room, Constraints())
    steps = np.linspace(0, 1, 11)
    splits = [(a, b, 1 - a - b) for a, b in itertools.product(steps, steps) if a + b <= 1 + 1e-9]
    best = np.inf
    points = np.array(
        [
            [1.0, *w, *c, *a, c[1] * share, 0.0]
            for w in splits
            for c in splits
            for a in ((1, 0, 0), (0, 1, 0))
            for share in np.linspace(0, 1, 6)
        ]
    )
    fits = np.all([points @ memory[tier] <= room[tier] for tier in room], axis=0)
    assert fits.any()
    times = sum(
        stage.count * np.max([points @ row.reshape(-1) for row in stage.seconds.values()], axis=0)
        for stage in model.stages
    )
    best = float(times[fits].min()) + model.launch_seconds.item()
    assert found.seconds <= best * 1.0001


def test_dual_is_what_a_gib_buys():
    hardware, _, model, memory = instance()
    room, times = capacity(hardware), StageTimes.of(model, 1.0)
    base = solve(times, memory, room, Constraints())
    more = solve(times, memory, {**room, "gpu": room["gpu"] + GIB // 256}, Constraints())
    assert base.seconds_per_gib["gpu"] > 0
    assert (base.seconds - more.seconds) * 256 == pytest.approx(base.seconds_per_gib["gpu"], rel=0.01)


@pytest.mark.parametrize("share", [None, 0.0, 0.5])
@pytest.mark.parametrize("on_disk", [True, False])
def test_no_program_is_faster_than_the_duals_of_others_allow(share, on_disk):
    """And its own duals say just what it takes."""
    constraints = Constraints(cpu_attention=share)
    tight = 0
    for (model, machine, gpu, cpu), bits in itertools.product(
        [("opt-30b", "h200", 16, 96), ("opt-6.7b", "t4", 8, 24), ("llama-3-70b", "t4", 14, 60)], [(16, 16), (4, 4)]
    ):
        duals = Duals(share, None, on_disk)
        for batch, count in [(32, 4), (48, 4), (24, 6), (256, 2), (4, 16), (31, 1), (40, 1)]:
            hardware, _, passes, memory = instance(model, machine, gpu, cpu, batch, count, bits)
            times, budgets = StageTimes.of(passes, 3.0), capacity(hardware)
            least = duals.least_seconds(times, memory, budgets)
            found = solve(times, memory, budgets, constraints, on_disk)
            if found is None:
                continue
            seconds = times.at(found.point) - times.constant
            assert least <= seconds * (1 + 1e-6), (model, bits, batch, count)
            tight += least > 0.95 * seconds
            duals.add(found)
            assert duals.least_seconds(times, memory, budgets) == pytest.approx(seconds, rel=1e-4)
    assert tight >= 6


def test_deferred_blocks_are_placed_when_they_are_asked_for():
    """The best of a family are what placing every block at once would give, by fewer programs."""
    hardware = load_hardware("h200").with_memory(gpu=16 * GIB, cpu=64 * GIB)
    lazy, eager = (Search(public_shape("opt-30b"), hardware, WORKLOAD, Constraints()) for _ in range(2))
    one = Split(1, 0)
    sizes = [
        Policy(one, one, one, batch, count, cpu_attention=1.0, prefill_budget=512)
        for batch, count in itertools.product((8, 16, 24, 32, 48, 64, 96), (1, 2, 4, 8))
    ]
    for policy in sizes:
        lazy.attempt(policy)
        eager.attempt(policy, 0.0)
    for count in (1, 2, 12, 100):
        found, expected = lazy.best(sizes[0], count), eager.best(sizes[0], count)
        # What cannot be as fast as the best for its compute alone is never placed.
        kept = [each for each in expected if lazy.tried[family_of(each.policy)][each.policy] is not None]
        assert [each.policy for each in found] == [each.policy for each in kept][:count]
        assert found[0].tokens_per_second == lazy.top(sizes[0]) == eager.top(sizes[0])
        if count == 2:
            assert 2 * lazy.linear_programs < eager.linear_programs


def test_whole_search_for_the_largest_model_is_short():
    """Counted, not timed: 394 programs took 3 seconds, and 13 on a busy machine."""
    plan = chosen("opt-175b", "t4")
    assert plan.linear_programs < 600
    assert not plan.missing


@pytest.mark.slow  # 6 s of processor time
@pytest.mark.parametrize("model, gpu, cpu, every", MACHINES)
def test_choice_beats_its_neighbors(model, gpu, cpu, every):
    """No block of another size, with its own best splits, is better by more than 1 %."""
    hardware = load_hardware("h200").with_memory(gpu=gpu * GIB, cpu=cpu * GIB)
    shape = public_shape(model)
    plan = chosen(model, "h200", gpu, cpu)
    b, k = plan.policy.gpu_batch_size, plan.policy.num_gpu_batches
    others = [(b * 2, k), (b // 2, k), (b, k + 1), (b, k - 1), (b * 2, k // 2), (b // 2, k * 2), (b + 3, k), (b - 3, k)]
    for batch, count in (pair for pair in others[::every] if min(pair) > 0):
        try:
            other = choose(shape, hardware, WORKLOAD, Constraints(gpu_batch_size=batch, num_gpu_batches=count))
        except DoesNotFit:
            continue
        assert other.predicted_tokens_per_second <= plan.predicted_tokens_per_second * 1.01, (batch, count)


ANY_JOB = given(
    model=st.sampled_from(["opt-1.3b", "opt-6.7b", "llama-3-8b", "opt-30b"]),
    gpu=st.floats(6, 40),
    cpu=st.floats(12, 120),
    prompt=st.integers(16, 1500),
    output=st.integers(2, 300),
    sequences=st.sampled_from([None, 7, 300]),
    bits=st.sampled_from([(16, 16), (4, 16), (4, 4)]),
)


@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@ANY_JOB
def test_what_is_proposed_fits(**job):
    proposed_fits(**job)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@ANY_JOB
def test_what_is_proposed_for_many_jobs_fits(**job):
    proposed_fits(**job)


def proposed_fits(model, gpu, cpu, prompt, output, sequences, bits):
    hardware = load_hardware("h200").with_memory(gpu=int(gpu * GIB), cpu=int(cpu * GIB))
    shape, workload = public_shape(model), Workload.uniform(prompt, output, sequences)
    try:
        plan = choose(shape, hardware, workload, Constraints(weight_bits=bits[:1], cache_bits=bits[1:]))
    except DoesNotFit as refusal:
        assert "missing" in str(refusal)
        return
    assert not shortfall(peak_memory(shape, hardware, workload, plan.policy), hardware)
    assert plan.predicted_tokens_per_second <= plan.bound_tokens_per_second * (1 + 1e-9)
    assert plan.bound_tokens_per_second <= plan.machine_bound_tokens_per_second * 1.001
    if sequences:
        assert plan.policy.block_size < 2 * sequences + plan.policy.gpu_batch_size


@pytest.mark.parametrize("count", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_rounding_to_tensors_and_sequences_still_fits(count):
    """The program's fractions alone would exceed the budget by a part of a tensor at most of these sizes."""
    shape, fixed = public_shape("opt-30b"), Constraints(gpu_batch_size=16, num_gpu_batches=2)
    for gpu in np.linspace(6, 40, count):
        hardware = load_hardware("h200").with_memory(gpu=int(gpu * GIB), cpu=80 * GIB)
        plan = choose(shape, hardware, WORKLOAD, fixed)
        assert not shortfall(peak_memory(shape, hardware, WORKLOAD, plan.policy), hardware)


@pytest.mark.slow  # 7 s of processor time
def test_more_gpu_memory_never_costs_throughput():
    rates = []
    for gpu in (6, 16, 48):
        rates.append(chosen("opt-30b", "h200", gpu).predicted_tokens_per_second)
    # 1 %: the search's own tolerance.
    assert all(after >= before * 0.99 for before, after in itertools.pairwise(rates)), rates
    assert rates[-1] > 1.5 * rates[0]


@pytest.mark.slow  # the planner's tests ask the same of the whole choice
def test_disk_only_when_memory_is_short():
    plenty = chosen("opt-6.7b", "h200", 16, 100)
    short = chosen("opt-6.7b", "h200", 6, 8)
    assert plenty.policy.weights.disk == 0
    assert short.policy.weights.disk > 0
    assert short.predicted_tokens_per_second < plenty.predicted_tokens_per_second


@pytest.mark.parametrize(
    ("model", "bits", "cpu"), [("llama-3-70b", 4, 200), pytest.param("opt-6.7b", 16, 14, marks=pytest.mark.slow)]
)
def test_the_disk_is_used_for_a_gain_or_not_at_all(model, bits, cpu):
    """Where compute limits, a block that is a little larger on the disk is predicted as little faster, and writes
    tens of GiB first."""
    machine, shape = load_hardware("t4").with_memory(cpu=cpu * GIB), public_shape(model)
    given = Constraints(weight_bits=(bits,), cache_bits=(bits,))
    plan = choose(shape, machine, WORKLOAD, given)
    assert plan.hardware == machine
    on_disk = any(split.disk for split in (plan.policy.weights, plan.policy.cache, plan.policy.activations))
    try:
        without = choose(shape, machine.with_memory(disk=0), WORKLOAD, given).predicted_tokens_per_second
    except DoesNotFit:
        without = 0.0
    assert on_disk == (without < 0.99 * plan.predicted_tokens_per_second), (plan.policy, without)
    assert on_disk == (cpu < 200)


@pytest.mark.slow  # the planner's tests ask the same of the whole choice
def test_more_sequences_when_host_memory_grows():
    blocks = [chosen("opt-30b", "h200", 16, cpu).policy.block_size for cpu in (64, None)]  # the machine itself has 115
    assert blocks[0] < blocks[1]


def test_what_the_user_fixed_stays():
    given = Constraints(
        percent=(20, 80, 0, 100, None, None),
        gpu_batch_size=20,
        num_gpu_batches=2,
        cpu_attention=0.25,
        prefill_chunk=128,
        prefill_budget=256,
    )
    policy = choose(public_shape("opt-30b"), load_hardware("h200").with_memory(gpu=24 * GIB), WORKLOAD, given).policy
    assert policy.weights.fractions == pytest.approx((0.2, 0.8, 0))
    assert policy.cache.fractions == pytest.approx((0, 1, 0))
    assert (policy.gpu_batch_size, policy.num_gpu_batches, policy.prefill_chunk, policy.prefill_budget) == (
        20,
        2,
        128,
        256,
    )
    assert policy.cpu_attention == 0.25


def test_a_fixed_size_leaves_the_other_free():
    plan = choose(
        public_shape("opt-6.7b"),
        load_hardware("h200").with_memory(gpu=24 * GIB),
        WORKLOAD,
        Constraints(gpu_batch_size=13),
    )
    assert plan.policy.gpu_batch_size == 13


def test_refusal_says_what_is_missing():
    with pytest.raises(DoesNotFit) as refusal:
        choose(public_shape("opt-175b"), load_hardware("t4").with_memory(gpu=2 * GIB), WORKLOAD)
    text = str(refusal.value)
    assert "weight slabs" in text and "--gpu-memory" in text
    with pytest.raises(DoesNotFit) as refusal:
        choose(
            public_shape("opt-30b"),
            load_hardware("h200"),
            WORKLOAD,
            Constraints(percent=(100, 0, 100, 0, 100, 0), gpu_batch_size=4000, num_gpu_batches=1),
        )
    assert "--percent" in str(refusal.value)


def test_cpu_attention_costs_nothing_without_a_cache_on_the_cpu():
    hardware, shape = load_hardware("h200"), public_shape("opt-1.3b")
    policies = [Policy(Split(1, 0), Split(1, 0), Split(1, 0), 8, 1, cpu_attention=share) for share in (0.0, 1.0)]
    without, with_share = (price(shape, hardware, WORKLOAD, policy) for policy in policies)
    assert with_share.policy.cpu_attention == 1.0, "the plan says what was asked for"
    assert (
        with_share.predicted_tokens_per_second == without.predicted_tokens_per_second
        and with_share.memory == without.memory
    )


def test_the_machines_bound_knows_no_tiles():
    shape, workload = public_shape("opt-1.3b"), Workload.uniform(256, 512)
    machines = [dataclasses.replace(load_hardware("h200"), attention_tile_keys=keys) for keys in (0.0, 64.0)]
    exact, tiled = (machine_bound(shape, machine, workload, Constraints(), 16, 16) for machine in machines)
    assert exact is not None and tiled == exact


@pytest.mark.parametrize("sequences", [64, None])
def test_no_plan_exceeds_the_machines_bound(sequences):
    """A machine without a GPU and a model with a large head: compute-bound, where the bound is tight."""
    hardware = load_hardware("cpu").with_memory(GIB, 2 * GIB)
    plan = choose(public_shape("opt-1.3b"), hardware, Workload.uniform(64, 32, sequences))
    assert max(plan.predicted_tokens_per_second, plan.bound_tokens_per_second) <= plan.machine_bound_tokens_per_second


@pytest.mark.parametrize(
    ("model", "ranks", "bits"),
    [
        *(("llama-3-8b", *each) for each in ((1, 8), (1, 4), (2, 16), (2, 4))),
        ("qwen3-30b-a3b", 2, 4),
        *(pytest.param("qwen3-30b-a3b", *each, marks=pytest.mark.slow) for each in ((1, 16), (1, 4), (2, 16), (2, 8))),
    ],
)
def test_no_plan_of_a_gpu_exceeds_the_machines_bound(model, ranks, bits):
    """Of two ranks every sequence had the latency of all sums to itself, and of quantized weights the start of every
    product in codes: bounds were a fifth of what plans reach, and the search stopped at its first family."""
    machine = dataclasses.replace(load_hardware("h200"), interconnect=300e9, interconnect_seconds=33e-6)
    shape, weights = public_shape(model), public_shape(model).total_bytes(bits)
    hardware = shared_by(machine.with_memory(gpu=int(weights), cpu=int(3 * weights)), ranks, ranks)
    wanted = Workload.uniform(224, 17, 251)
    limits = Constraints(weight_bits=(bits,), cache_bits=(bits,))
    free = choose(shape, hardware, wanted, limits)
    assert max(free.predicted_tokens_per_second, free.bound_tokens_per_second) <= free.machine_bound_tokens_per_second
    without = choose(shape, hardware, wanted, dataclasses.replace(limits, cpu_attention=0.0))
    assert free.predicted_tokens_per_second >= 0.99 * without.predicted_tokens_per_second


def test_bits_change_only_when_allowed():
    hardware, shape = load_hardware("h200").with_memory(gpu=16 * GIB), public_shape("opt-30b")
    plain = chosen("opt-30b", "h200", 16)
    free = choose(shape, hardware, WORKLOAD, Constraints(weight_bits=(16, 4), cache_bits=(16, 4), gpu_batch_size=128))
    assert (plain.policy.weight_bits, plain.policy.cache_bits) == (16, 16)
    assert (free.policy.weight_bits, free.policy.cache_bits) == (4, 4)
    for plan in (plain, free):
        assert plan.predicted_tokens_per_second < plan.machine_bound_tokens_per_second
    assert free.predicted_tokens_per_second > 2 * plain.predicted_tokens_per_second


def test_without_overlap_is_slower():
    hardware, shape = load_hardware("h200").with_memory(gpu=16 * GIB), public_shape("opt-30b")
    policy = chosen("opt-30b", "h200", 16).policy
    serial = price(shape, hardware, WORKLOAD, dataclasses.replace(policy, overlap=False))
    assert (
        serial.predicted_tokens_per_second < 0.8 * price(shape, hardware, WORKLOAD, policy).predicted_tokens_per_second
    )
