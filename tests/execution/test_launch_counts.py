"""What ticks launch on a GPU beside what the cost model counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from flexbatch.policy.launches import ALLOCATION, COUNTED, KERNELS_OF_TICK, TRITON_KERNEL

pytest.importorskip("triton")
PLAIN, FEW, MANY, EXPANDED, RANK = (16, 1, 126), (4, 1, 12), (4, 1, 126), (4, 1, 3000), (4, 2, 126)
"""Bits, ranks and tokens of a micro-batch."""


@pytest.fixture(scope="module")
def counts() -> dict[tuple[int, int, int], dict[str, int]]:
    cells = PLAIN, FEW, MANY, EXPANDED, RANK
    command = [sys.executable, "-m", "tests.execution.launch_counts", json.dumps(cells)]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(cells, json.loads(done.stdout), strict=True))


def measure(found: dict[str, int]) -> float:
    """In kernels of torch."""
    return TRITON_KERNEL * found["triton"] + found.get("products", 0) + ALLOCATION * found.get("allocations", 0)


def test_a_tick_launches_what_the_cost_model_counts(counts):
    """But for copies and their events, which come from the queues and not from the layers."""
    plain = measure(counts[PLAIN])
    assert 0.6 * KERNELS_OF_TICK <= plain <= KERNELS_OF_TICK
    for cell, what in ((FEW, "coded"), (MANY, "coded"), (EXPANDED, "expand")):
        assert abs(measure(counts[cell]) - plain - COUNTED[what]) <= 2, (cell, counts[cell], counts[PLAIN])


def test_a_rank_launches_two_sums_more(counts):
    assert "sums" not in counts[MANY] and counts[RANK].pop("sums") == 2
    assert measure(counts[RANK]) == pytest.approx(measure(counts[MANY]), abs=TRITON_KERNEL)
