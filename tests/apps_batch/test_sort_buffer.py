from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.apps.jobs.channel import Canceled, Channel
from flexbatch.apps.jobs.sort_buffer import order_rows

prompts = st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=30)


@given(prompts, st.data())
def test_every_row_is_issued_once_with_shared_beginnings_together(
    prompts: list[list[int]], data: st.DataObject
) -> None:
    max_tokens = [data.draw(st.integers(0, 9)) for _ in prompts]
    order = order_rows(prompts, max_tokens, shared_tokens=3)
    assert sorted(order) == list(range(len(prompts)))
    heads = [tuple(prompts[row][:3]) for row in order if len(prompts[row]) >= 3]
    seen = [head for position, head in enumerate(heads) if position == 0 or heads[position - 1] != head]
    assert len(seen) == len(set(seen))


def test_without_shared_beginnings_the_longest_goes_first() -> None:
    assert order_rows([[1], [2, 2, 2], [3, 3]], [10, 1, 20], shared_tokens=2) == [2, 0, 1]


def test_a_group_stands_where_its_longest_row_stands() -> None:
    prompts = [[1] * 4, [2] * 2, [2] * 2 + [3] * 9, [4] * 6]
    assert order_rows(prompts, [0] * 4, shared_tokens=2) == [1, 2, 3, 0]


def test_a_channel_is_bounded_and_ends_with_its_producers_error() -> None:
    channel: Channel[int] = Channel(2)
    produced: list[int] = []

    def produce() -> None:
        for value in range(5):
            channel.put(value)
            produced.append(value)
        channel.close(ValueError("the end"))

    thread = threading.Thread(target=produce)
    thread.start()
    values = iter(channel)
    assert next(values) == 0
    thread.join(0.05)
    assert len(produced) <= 3
    assert [next(values) for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="the end"):
        next(values)
    thread.join()


@pytest.mark.parametrize("end", ["cancel", "close"])
def test_a_producer_that_waits_for_room_is_freed(end: str) -> None:
    channel: Channel[int] = Channel(1)
    channel.put(0)
    freed = []

    def produce() -> None:
        try:
            channel.put(1)
        except Canceled:
            freed.append(True)

    thread = threading.Thread(target=produce)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    getattr(channel, end)()
    thread.join(60)
    assert freed
