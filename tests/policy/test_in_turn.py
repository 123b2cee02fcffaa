"""CPU attention in turn with launching and the GPU: against the executor's order with random times, and against what
it puts off."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.execution.tick_halves import TickHalves
from flexbatch.policy.affine import affine
from flexbatch.policy.hardware import load_hardware
from flexbatch.policy.in_turn import in_turn_seconds, ticks_put_off
from flexbatch.policy.pass_load import PassLoad
from flexbatch.policy.policy import Policy, Split
from flexbatch.policy.shapes import public_shape

SHAPE, LAYERS = public_shape("opt-30b"), 48
DECODE, MIXED = PassLoad.decode(12, 500), PassLoad.decode(12, 500) + PassLoad.prefill(4, 100)
PART = st.sampled_from([0.01, 0.1, 1.0]).flatmap(lambda most: st.floats(most / 10, most))


def policy_of(micro_batches: int, **changes: Any) -> Policy:
    return Policy(Split(1, 0), Split(0, 1), Split(1, 0), 4, micro_batches, **{"cpu_attention": 1.0, **changes})


def seconds_of_a_layer(
    micro_batches: int, put_off: int, launching: tuple[float, float], computing: tuple[float, float], attending: float
) -> float:
    """When the passes of `Executor.sweep` are under way. launching, computing: of the first and of the second half of a
    tick, on the host and on the GPU, which begins with what has been launched whole."""
    host = gpu = cpu = 0.0
    attended, deferred, marks = dict[tuple[int, int], float](), list[tuple[int, int]](), list[float]()

    def launch(half: int) -> float:
        nonlocal host, gpu
        host += launching[half]
        gpu = max(gpu, host) + computing[half]
        return gpu

    def finish() -> None:
        nonlocal host
        host = max(host, attended[deferred.pop(0)])
        launch(1)

    for layer in range(LAYERS):
        for k in range(micro_batches):
            while any(other == k for _, other in deferred):
                finish()
            cpu = max(cpu, launch(0)) + attending
            attended[layer, k] = cpu
            while len(deferred) > max(0, put_off - 1):
                finish()
            deferred.append((layer, k))
        marks.append(host)
    return (marks[-1] - marks[LAYERS // 2]) / (LAYERS - 1 - LAYERS // 2)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), st.sampled_from([DECODE, MIXED]), st.tuples(PART, PART), st.tuples(PART, PART), PART)
def test_no_order_of_the_executor_is_faster(
    count: int, load: PassLoad, launching: tuple[float, float], computing: tuple[float, float], attending: float
) -> None:
    """And the longest of what is busy and of this is no more than the second halves on the GPU longer."""
    policy = policy_of(count)
    free = dataclasses.replace(load_hardware("h200"), launch_seconds=0.0, exchange_seconds=0.0)
    host = dataclasses.replace(free, exchange_seconds=sum(launching)) if count == 1 else free
    ticks = {"on_cores": affine(count * attending), "gpu_seconds": affine(count * sum(computing))}
    row = in_turn_seconds(SHAPE, host, policy, load, **ticks, calls=np.asarray(float(count)))
    if count > 1:  # what CPU attention has the host launch is a share of a tick's launches
        row = row + count * sum(launching) / (1 + float(ticks_put_off(SHAPE, policy, load)))
    busiest = count * max(sum(launching), sum(computing), attending)
    predicted = max(busiest, float(row.reshape(-1)[0]))
    put_off = max(1, int(ticks_put_off(SHAPE, policy, load)))
    found = seconds_of_a_layer(count, put_off, launching, computing, attending)
    # A pass has an end, at which the order is another one.
    assert 0.99 * found <= predicted <= 1.01 * (found + count * computing[1])


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("experts", [0.0, 0.5])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("decodes", [True, False])
def test_what_is_put_off_is_what_the_executor_puts_off(count: int, experts: float, stages: int, decodes: bool) -> None:
    halves = SimpleNamespace(
        routed=object() if experts else None,
        ends=SimpleNamespace(stages=object() if stages > 1 else None),
        weights=SimpleNamespace(slabs=[0, 1, 2]),
    )
    inputs = [SimpleNamespace(decodes=decodes)] * count
    executed = TickHalves.most_deferred(cast("Any", halves), cast("Any", inputs))
    shape, policy = dataclasses.replace(SHAPE, stages=stages), policy_of(count, cpu_experts=experts)
    found = ticks_put_off(shape, policy, DECODE if decodes else MIXED)
    # Of one micro-batch the second half comes before its next first half, whatever might be put off.
    assert float(found) == (0 if count == 1 else executed)
