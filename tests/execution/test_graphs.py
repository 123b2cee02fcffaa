"""Which CUDA graph a decode pass runs in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flexbatch.execution.graphs import MAX_SEQUENCES, bucket_of, smallest_covering

keys = st.tuples(st.integers(1, MAX_SEQUENCES).map(bucket_of), st.sampled_from([512, 1024, 2048]))


@given(st.integers(1, MAX_SEQUENCES))
def test_a_bucket_has_room_and_wastes_less_than_half_or_32_places(count: int) -> None:
    assert count <= bucket_of(count) < max(2 * count, count + 32)


@given(st.lists(keys), keys)
def test_the_smallest_graph_with_room(captured: list[tuple[int, int]], key: tuple[int, int]) -> None:
    found = smallest_covering(captured, key)
    fitting = [other for other in captured if other[0] >= key[0] and other[1] >= key[1]]
    assert (found is None) == (not fitting)
    if found is not None:
        assert found in fitting and all(found[0] <= other[0] for other in fitting)
        assert key not in captured or found == key
