"""What the benchmark says of a GPU's time, by spans of kernels that run beside and after each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmark.gpu_busy import busy


def test_waits_are_named_by_what_is_around_them():
    found = busy([(0, 10, "a"), (2, 5, "inside"), (5, 12, "b"), (20, 30, "a"), (30, 40, "c"), (41, 50, "d")])
    assert found["busy"] == pytest.approx(41 / 50)
    assert found["gaps"] == [{"us": 8, "after": "b", "before": "a"}, {"us": 1, "after": "c", "before": "d"}]
    assert found["kernels"]["a"] == pytest.approx(20 / 50)
    assert busy([])["busy"] == 0


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), min_size=1, max_size=12))
def test_every_instant_counts_once(spans):
    spans = sorted((start, start + length, "kernel") for start, length in spans)
    instants = {instant for start, end, _ in spans for instant in range(start, end)}
    whole = max(end for _, end, _ in spans) - spans[0][0]
    assert busy(spans)["busy"] == pytest.approx(len(instants) / whole, abs=1e-4)
