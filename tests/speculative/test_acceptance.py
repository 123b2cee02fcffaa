"""Acceptance statistics and the choice of trees by cost."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.speculative.acceptance import AcceptanceStatistics, Group, PiecewiseLinear, choose_shapes, path_gains
from flexbatch.speculative.shapes import StaticTrees, fixed_widths
from flexbatch.speculative.tree import TokenTree, TreeShape, chain
from flexbatch.speculative.verify import AcceptedPath
from tests.speculative.test_shapes import expected_tokens


def free(depth: float, nodes: float) -> float:
    return 0.0


def test_offers_and_takes_are_counted_by_depth_and_rank() -> None:
    tree = TokenTree((4, 5, 6, 7, 8), TreeShape((-1, -1, 0, 0, 3)))
    statistics = AcceptanceStatistics(3, 2)
    statistics.observe(tree, AcceptedPath((0, 3, 4), 1))
    statistics.observe(tree, AcceptedPath((1,), 1))
    statistics.observe(tree, AcceptedPath((), 1))
    statistics.observe(TokenTree(), AcceptedPath((), 1))
    assert statistics.offered.tolist() == [[3, 3], [1, 1], [1, 0]]
    assert statistics.taken.tolist() == [[1, 1], [0, 1], [1, 0]]
    assert (statistics.trees, statistics.tokens) == (3, 4 + 2 + 1)
    statistics.check()
    statistics.taken[0, 0] = 4
    with pytest.raises(AssertionError, match="exceeds"):
        statistics.check()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 400))
def test_estimates_converge_and_are_a_falling_table(seed: int, observed: int) -> None:
    generator = np.random.default_rng(seed)
    chances = [0.5, 0.25, 0.05]
    statistics = AcceptanceStatistics(4, 4, decay=1.0)
    shape = fixed_widths((3, 3, 3, 3))
    tree = TokenTree(tuple(node + 1 for node in range(len(shape))), shape)
    for _ in range(observed):
        path, row = [], 0
        while shape.children[row] and (rank := int(generator.choice(4, p=[*chances, 0.2]))) < 3:
            path.append(shape.children[row][rank])
            row = path[-1] + 1
        statistics.observe(tree, AcceptedPath(tuple(path), 0))
    statistics.check()
    table = statistics.table()
    StaticTrees(table, 1)
    for row in table:
        assert sum(row) <= 1 + 1e-9 and all(a >= b for a, b in pairwise(row))
    if observed >= 200:
        assert table[0] == pytest.approx([*chances, 0.0], abs=0.15)


def test_paths_deeper_and_wider_than_the_table_are_left_out() -> None:
    statistics = AcceptanceStatistics(2, 2)
    statistics.observe(chain([1, 2, 3, 4]), AcceptedPath((0, 1, 2, 3), 5))
    statistics.observe(TokenTree((1, 2, 3), TreeShape((-1, -1, -1))), AcceptedPath((2,), 5))
    assert statistics.offered.tolist() == [[2, 1], [1, 0]] and statistics.taken.tolist() == [[1, 0], [1, 0]]
    statistics.check()


def test_piecewise_linear() -> None:
    cost = PiecewiseLinear(((1, 2.0), (100, 2.0), (200, 4.0)))
    assert [cost(x) for x in (0, 1, 50, 100, 150, 200, 300)] == [2, 2, 2, 2, 3, 4, 6]
    assert PiecewiseLinear(((5, 1.5),))(80) == 1.5
    with pytest.raises(ValueError, match="rising"):
        PiecewiseLinear(((5, 1.0), (5, 2.0)))


TABLE = ((0.6, 0.2, 0.1),) * 4


def test_a_pass_bound_by_links_takes_the_whole_tree_and_one_bound_by_compute_none() -> None:
    flat = choose_shapes([Group(8, TABLE)], lambda q: 1.0, free, max_nodes=30, margin=0.0)
    assert len(flat.shapes[0]) == 30 and flat.tokens == pytest.approx(8 * StaticTrees(TABLE, 30).expected_tokens[30])
    steep = choose_shapes([Group(8, TABLE)], lambda q: 0.01 * q, free, max_nodes=30)
    assert len(steep.shapes[0]) == 0 and steep.tokens_per_second == pytest.approx(100)


def test_of_trees_about_as_good_the_smallest_is_taken() -> None:
    best = choose_shapes([Group(8, TABLE)], lambda q: 1.0, free, max_nodes=30, margin=0.0)
    small = choose_shapes([Group(8, TABLE)], lambda q: 1.0, free, max_nodes=30, margin=0.1)
    assert len(small.shapes[0]) < 25 and small.tokens_per_second >= 0.9 * best.tokens_per_second
    assert small.tokens == pytest.approx(8 * expected_tokens(small.shapes[0], TABLE))


def test_a_hopeless_draft_and_a_slow_one_are_left_out() -> None:
    assert not len(
        choose_shapes([Group(8, ((0.01, 0.001),) * 4)], lambda q: 1.0, lambda depth, nodes: 0.02 * depth).shapes[0]
    )
    slow = choose_shapes([Group(8, TABLE)], lambda q: 1.0, lambda depth, nodes: 1.0 * depth)
    quick = choose_shapes([Group(8, TABLE)], lambda q: 1.0, lambda depth, nodes: 0.1 * depth)
    assert slow.shapes[0].max_depth < quick.shapes[0].max_depth
    assert quick.tokens / (1.0 + 0.1 * quick.shapes[0].max_depth) >= quick.tokens_per_second - 1e-12


def test_the_tree_shrinks_as_the_block_grows() -> None:
    cost = PiecewiseLinear(((1, 1.0), (512, 1.0), (1024, 2.0)))
    sizes = [
        len(choose_shapes([Group(live, TABLE)], cost, free, max_nodes=64).shapes[0]) for live in (4, 16, 64, 256, 512)
    ]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 40 and sizes[-1] == 0
    assert len(choose_shapes([Group(16, TABLE)], cost, free, other_query_tokens=500).shapes[0]) < sizes[1]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.floats(0.05, 0.7), st.floats(0, 0.25)), min_size=1, max_size=2),
    st.floats(0, 0.2),
    st.floats(0, 0.3),
)
def test_choice_is_the_best_of_all_sizes_for_every_group(live: int, parts, slope: float, per_depth: float) -> None:
    groups = [Group(live, ((first, min(first, second)),) * 3) for first, second in parts]

    def pass_seconds(queries: float) -> float:
        return 1 + slope * max(0.0, queries - 6)

    def draft_seconds(depth: float, nodes: float) -> float:
        return per_depth * depth

    choice = choose_shapes(groups, pass_seconds, draft_seconds, max_nodes=6, margin=0.0)
    best = 0.0
    for depth, sizes in product(range(4), product(range(7), repeat=len(groups))):
        shapes = [
            StaticTrees(group.acceptance[:depth], 6).shape(size) for group, size in zip(groups, sizes, strict=True)
        ]
        tokens = sum(
            group.sequences * expected_tokens(shape, group.acceptance)
            for group, shape in zip(groups, shapes, strict=True)
        )
        seconds = pass_seconds(
            sum(group.sequences * (1 + len(shape)) for group, shape in zip(groups, shapes, strict=True))
        )
        best = max(best, tokens / (seconds + (draft_seconds(depth, 0) if any(map(len, shapes)) else 0)))
    assert choice.tokens_per_second == pytest.approx(best)
    tokens = sum(
        group.sequences * expected_tokens(shape, group.acceptance)
        for group, shape in zip(groups, choice.shapes, strict=True)
    )
    assert choice.tokens == pytest.approx(tokens)


@given(st.lists(st.lists(st.floats(0, 0.3), min_size=3, max_size=3), min_size=1, max_size=5))
def test_gains_of_nodes_are_those_of_the_dynamic_program(rows) -> None:
    table = tuple(tuple(sorted(row, reverse=True)) for row in rows)
    gains = path_gains(table, 20)
    totals = [1 + sum(gains[:nodes]) for nodes in range(21)]
    assert totals == pytest.approx(StaticTrees(table, 20).expected_tokens.tolist())


def test_what_beginning_costs_is_weighed_against_the_tokens_left() -> None:
    begin = [
        len(choose_shapes([Group(8, TABLE)], lambda q: 1.0, free, starting=(20.0, left)).shapes[0])
        for left in (50.0, 5000.0)
    ]
    assert begin[0] == 0 and begin[1] > 10
    assert not len(choose_shapes([Group(8, TABLE)], lambda q: 1.0, free, least_gain=4.0).shapes[0])


def test_a_table_rising_with_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="must not rise with rank"):
        Group(1, ((0.1, 0.2),))
