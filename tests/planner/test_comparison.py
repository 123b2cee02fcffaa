"""Speculation beside plain decoding, by turns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbatch import SamplingParams
from flexbatch.planner.comparison import MOST_SLICES, Comparison, turns
from flexbatch.request import Request


def requests_of(count: int) -> list[Request]:
    return [Request(index, [5, 6], SamplingParams(max_tokens=3)) for index in range(count)]


@given(count=st.integers(1, 200), block=st.integers(1, 60))
def test_every_request_is_run_both_ways_in_turns_whose_order_changes(count: int, block: int) -> None:
    job = requests_of(count)
    found = list(turns(job, block))
    for drafted in (False, True):
        kept = [request for turn in found if turn.kept and turn.drafted is drafted for request in turn.requests]
        assert kept == job, "each request once, in order"
    kinds = [turn.drafted for turn in found]
    assert len(kinds) % 2 == 0 and len(kinds) <= 2 * max(2, MOST_SLICES)
    # Plain first, then drafted first: what a machine does to the first of two hits both.
    for number in range(0, len(kinds), 2):
        assert kinds[number : number + 2] == ([False, True] if number % 4 == 0 else [True, False])
    for turn in found:
        assert len(turn.requests) % block == 0 or turn.requests[-1] is job[-1], "slices are whole blocks"
        assert len(turn.requests) >= min(block, count) or turn.requests[-1] is job[-1]


def test_a_machine_that_becomes_slower_slows_both_alike() -> None:
    """Every turn takes a tenth longer than the one before it; the speed-up is 2."""
    comparison, job, slower = Comparison(), requests_of(40), 1.0
    for turn in turns(job, 5):
        comparison.add(turn, slower * len(turn.requests) / (2 if turn.drafted else 1), 3 * len(turn.requests))
        comparison.check()
        slower *= 1.1
    found = comparison.describe()
    assert found["speed_up"] == pytest.approx(2, rel=0.03)
    # By turns the first of a pair has the better machine: the order changes, and so does who that is.
    assert {round(rate, 2) for rate in found["speed_up_by_turn"]} == {1.82, 2.2}


def test_a_turn_that_fails_leaves_no_half_pair() -> None:
    comparison, first, second = Comparison(), requests_of(3), requests_of(3)
    plain, drafted = list(turns(first, 8))[:2]
    comparison.add(plain, 1.0, 9)
    assert comparison.describe() == {}
    for turn in list(turns(second, 8))[:2]:
        comparison.add(turn, 1.0, 9)
    comparison.add(drafted, 1.0, 9)
    comparison.check()
    assert len(comparison.pairs) == 1 and comparison.describe()["speed_up"] == 1
