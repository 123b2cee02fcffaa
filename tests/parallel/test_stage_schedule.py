"""How long stages take that work as the loop over a pipeline has them, and that a plan says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from flexbatch.execution import pipelined
from flexbatch.execution.pipelined import PipelinedPasses
from flexbatch.policy.hardware import load_hardware
from flexbatch.policy.plan import Plan, price
from flexbatch.policy.policy import Policy, Split
from flexbatch.policy.shapes import public_shape
from flexbatch.policy.workload import Workload
from flexbatch.trace import Tracer

PASSES = 40
"""Of each part of the block."""


class Stages:
    """Stages that take so many seconds for the layers of a pass, the first one ``head`` more for its tokens: each does
    what it is given in the order in which that was launched, and the host waits for tokens alone."""

    def __init__(self, layers: list[float], head: float) -> None:
        self.layers, self.head = layers, head
        self.free = [0.0] * len(layers)
        """When each has done what it was given."""
        self.busy = [0.0] * len(layers)
        self.now = 0.0
        """Of the host."""

    def take(self, stage: int, earliest: float, seconds: float) -> float:
        self.free[stage] = max(self.free[stage], earliest) + seconds
        self.busy[stage] += seconds
        return self.free[stage]

    def run(self, batch: Any) -> Iterator[None]:
        at = self.now
        for stage, seconds in enumerate(self.layers):
            at = self.take(stage, at, seconds)
        yield None
        self.now = self.take(0, at, self.head)


class Block:
    """As much of a scheduler as the loop asks for: parts whose sequences decode so many times."""

    def __init__(self, parts: int) -> None:
        self.left = [PASSES] * parts
        self.aside, self.block = SimpleNamespace(recomputes=False), SimpleNamespace(all_can_grow=lambda: True)
        self.running: dict[int, Any] = {}
        self.proposer, self.parts, self.settled, self.reaching = None, parts, True, False

    def has_work(self) -> bool:
        return any(self.left)

    def next_pass(self, part: int, parts: int) -> Any:
        some = bool(self.left[part])
        self.left[part] -= some
        return SimpleNamespace(micro_batches=(part,) * some, others=(), part=part)

    def commit(self, *drawn: Any) -> None:
        pass


def drawn(chunks: Iterator[None], *context: Any) -> Any:
    for _ in chunks:
        pass
    return SimpleNamespace(read=dict, decoded=None)


@pytest.mark.parametrize(
    ("layers", "head"),
    [
        ([9.0, 10.0], 1.0),
        ([9.0, 10.0, 10.0, 10.0], 1.0),
        ([6.0, 10.0], 1.0),
        ([12.0, 10.0], 0.5),
        ([7.0, 9.0, 8.0], 2.0),
    ],
    ids=str,
)
def test_the_slowest_stage_is_always_busy(layers, head, monkeypatch):
    """With as many passes in flight as there are stages: a job takes what a plan says, as many passes of the slowest
    stage as all parts have together, and a first pass on the others."""
    monkeypatch.setattr(pipelined, "sample_tokens", drawn)
    stages, parts = Stages(layers, head), len(layers)
    loop = PipelinedPasses(Block(parts), stages, Tracer(), parts)  # type: ignore[arg-type]
    while loop.turn() is not None:
        pass
    slowest = max(layers[0] + head, *layers[1:])
    planned = parts * PASSES * slowest + (parts - 1) * slowest
    assert stages.now == pytest.approx(planned, abs=parts * slowest)
    assert max(stages.busy) == parts * PASSES * slowest
    assert max(stages.busy) / stages.now > 1 - parts / (parts * PASSES)


def test_the_runner_grows_once_nothing_is_in_flight(monkeypatch):
    """For a sequence that is longer than all before: other ranks were told of it in the middle of passes, which were
    brought to their ends for that, and their tokens were lost."""
    monkeypatch.setattr(pipelined, "sample_tokens", drawn)
    grown_beside: list[tuple[int, int]] = []

    class Growing(Block):
        def has_work(self) -> bool:
            wants = self.left[0] <= PASSES - 5 and not grown_beside
            self.reaching = wants and not self.settled
            if wants and self.settled:
                grown_beside.append((len(loop.in_flight), PASSES - self.left[0]))
            return super().has_work()

    loop = PipelinedPasses(Growing(3), Stages([1.0, 1.0, 1.0], 0.5), Tracer(), 3)  # type: ignore[arg-type]
    passes = 0
    while loop.turn() is not None:
        passes += 1
    assert grown_beside == [(0, 5)] and passes == 3 * PASSES


def test_a_plan_counts_the_passes_of_all_parts_and_the_fill():
    """The same sum in `policy.plan`, whose passes are those of the slowest stage."""
    lengths = ((64, 16),)
    workload, everything = Workload(lengths, 48), Split(1.0, 0.0)
    policy = Policy(everything, everything, everything, 24, 2)
    shape, machine = public_shape("opt-1.3b"), load_hardware("h200")

    def priced(stages: int, tell_seconds: float) -> Plan:
        hardware = dataclasses.replace(machine, tell_seconds=tell_seconds)
        return price(dataclasses.replace(shape, stages=stages), hardware, workload, policy)

    one, two, told = priced(1, 1.0), priced(2, 1e-9), priced(2, 0.5)
    assert one.seconds is not None and two.seconds is not None and told.seconds is not None
    assert two.passes == 2 * one.passes
    assert two.seconds == pytest.approx((2 + 1 / one.passes) * one.seconds, rel=0.05)
    assert told.seconds - two.seconds >= 0.5 * two.passes, "of each pass the stages are told, and one process nobody"
