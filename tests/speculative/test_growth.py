"""Growing trees level by level, and the learned costs of passes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.speculative.growth import GrowingTree, TreePlan
from flexbatch.speculative.shapes import StaticTrees, fixed_widths
from flexbatch.speculative.tree import TokenTree, TreeShape
from tests.speculative.tree_paths import path_tokens

VOCAB = 7


def children(path: tuple[int, ...]) -> list[tuple[int, float]]:
    """A made-up draft: distinct probabilities for every path, the likeliest first."""
    weights = [
        (math.sin(13.7 * token + 3.1 * sum((i + 1) * t for i, t in enumerate(path))) + 1.01) for token in range(VOCAB)
    ]
    total = sum(weights)
    return sorted(
        ((token, math.log(weight / total)) for token, weight in enumerate(weights)), key=lambda item: -item[1]
    )


def grown(plan: TreePlan) -> tuple[TokenTree, int]:
    tree, levels = GrowingTree(plan), 0
    while tree.frontier:
        tree.extend([children(tree.paths[node])[: tree.width] for node in tree.frontier])
        levels += 1
    return tree.tree(), levels


@settings(deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 5))
def test_a_shape_gets_the_likeliest_children_at_its_places(widths: list[int], limit: int) -> None:
    shape = fixed_widths(widths)
    tree, levels = grown(TreePlan(limit, len(shape), shape))
    assert levels == min(limit, len(widths))
    kept = [node for node, depth in enumerate(shape.depths) if depth <= limit]
    assert tree.parents == tuple(shape.parents[node] for node in kept)
    for node in range(len(tree)):
        expected = children(path_tokens(tree, tree.parents[node]))[tree.shape.ranks[node]]
        assert (tree.token_ids[node], (tree.logprobs or ())[node]) == expected


def test_an_uneven_shape_keeps_its_places() -> None:
    shape = StaticTrees(((0.6, 0.3), (0.5, 0.1), (0.5, 0.1)), 5).shape(5)
    tree, _ = grown(TreePlan(shape.max_depth, 5, shape))
    assert tree.shape == shape


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 20))
def test_a_beam_keeps_the_likeliest_paths_of_every_level(beam: int, depth: int, nodes: int) -> None:
    tree, levels = grown(TreePlan(depth, nodes, beam=beam))
    assert levels == depth and len(tree) == min(nodes, len(tree)) <= beam * depth
    level, candidates = [((), 0.0)], []
    for _ in range(depth):
        offers = [
            ((*path, token), above + logprob) for path, above in level for token, logprob in children(path)[:beam]
        ]
        level = sorted(offers, key=lambda item: -item[1])[:beam]
        candidates += level
    best = sorted((value for _, value in candidates), reverse=True)[:nodes]
    assert sorted(tree.path_logprobs, reverse=True) == pytest.approx(best)
    assert {path_tokens(tree, node) for node in range(len(tree))} <= {path for path, _ in candidates}


def test_missing_candidates_make_a_smaller_tree() -> None:
    tree = GrowingTree(TreePlan(2, 6, fixed_widths((2, 2))))
    tree.extend([[(3, -0.1)]])
    tree.extend([[(4, -0.2), (5, -0.3)]])
    assert tree.tree().parents == (-1, 0, 0) and not tree.frontier
    assert not GrowingTree(TreePlan(0, 0)).frontier and not GrowingTree(TreePlan(3, 0, TreeShape())).frontier
