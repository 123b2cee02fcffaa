from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.apps.jobs.layout import (
    MAX_PART_ROWS,
    PART_BYTES,
    Part,
    RowGroup,
    default_part_rows,
    plan_parts,
    shard_parts,
)
from tests.apps_batch.invariants import check_layout

row_groups = st.lists(
    st.builds(
        RowGroup,
        file=st.just("f"),
        rows=st.integers(0, 50),
        num_bytes=st.integers(0, 10**6),
        folder=st.sampled_from(["", "k=a", "k=b"]),
    ),
    max_size=12,
)


@given(row_groups, st.integers(1, 40))
def test_parts_hold_every_row_once_in_order(row_groups: list[RowGroup], part_rows: int) -> None:
    parts = plan_parts(row_groups, part_rows)
    if any(group.rows for group in row_groups):
        check_layout(parts, row_groups)
    assert all(part.rows <= part_rows for part in parts)


@given(row_groups, st.integers(1, 40))
def test_parts_are_full_unless_their_folder_ends(row_groups: list[RowGroup], part_rows: int) -> None:
    parts = plan_parts(row_groups, part_rows)
    for part, after in itertools.pairwise(parts):
        assert part.rows == part_rows or part.folder != after.folder


def test_an_input_without_rows_gives_one_empty_part() -> None:
    assert plan_parts([RowGroup("f", 0, 0, "k=a")], 10) == [Part(0, "k=a", 0, 0)]
    assert plan_parts([], 10) == [Part(0, "", 0, 0)]


@given(row_groups, st.integers(1, 10), st.integers(1, 7))
def test_shards_divide_the_parts_among_them(row_groups: list[RowGroup], part_rows: int, shards: int) -> None:
    parts = plan_parts(row_groups, part_rows)
    shares = [shard_parts(parts, shard, shards) for shard in range(shards)]
    assert [part for share in shares for part in share] == parts
    rows = [sum(part.rows for part in share) for share in shares]
    assert max(rows) - min(rows) <= 2 * part_rows


def test_a_shard_outside_the_count_is_refused() -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        shard_parts([], 2, 2)


def test_part_rows_follow_the_size_of_the_input() -> None:
    assert default_part_rows([RowGroup("f", 50, 500)]) == 100
    assert default_part_rows([RowGroup("f", 64_000, 64_000)]) == 1000
    assert default_part_rows([RowGroup("f", 10**8, 10**8)]) == MAX_PART_ROWS
    assert default_part_rows([RowGroup("f", 10_000, 10_000 * 2**20)]) == PART_BYTES // 2**20
    assert default_part_rows([RowGroup("f", 3, 10 * PART_BYTES)]) == 1


def test_a_layout_that_misses_rows_is_found() -> None:
    parts = plan_parts([RowGroup("f", 10, 0)], 4)
    with pytest.raises(AssertionError, match="miss rows"):
        check_layout(parts[:-1], [RowGroup("f", 10, 0)])
