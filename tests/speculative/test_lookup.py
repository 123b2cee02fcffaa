"""Drafting by lookup in the text so far."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.speculative.lookup import MAX_CANDIDATES, MAX_MATCH, Lookup
from tests.speculative.tree_paths import path_tokens

texts = st.lists(st.integers(0, 3), max_size=60)


def by_scanning(tokens: list[int], ngram: int, max_depth: int) -> list[tuple[int, ...]]:
    """Continuations in order of preference, by comparing the suffix with every earlier place."""
    found = []
    for end in range(ngram, len(tokens)):
        length = 0
        while length < min(end, MAX_MATCH) and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        if length >= ngram:
            virtual = list(tokens)
            for j in range(max_depth):
                virtual.append(virtual[end + j])
            found.append((end, length, tuple(virtual[len(tokens) :])))
    found = found[-MAX_CANDIDATES:]
    return [continuation for _, _, continuation in sorted(found, key=lambda item: (-item[1], -item[0]))]


@settings(deadline=None)
@given(texts, st.integers(1, 3), st.integers(1, 12), st.integers(1, 5))
def test_tree_holds_the_continuations_of_the_longest_matches(
    tokens: list[int], ngram: int, nodes: int, depth: int
) -> None:
    lookup = Lookup(tokens, ngram)
    lookup.check()
    tree = lookup.propose(nodes, depth)
    expected = by_scanning(tokens, ngram, depth)
    assert len(tree) <= nodes and tree.shape.max_depth <= depth
    assert bool(len(tree)) == bool(expected)
    if expected:
        best = expected[0][:nodes]
        assert tree.token_ids[: len(best)] == best and path_tokens(tree, len(best) - 1) == best
        prefixes = {continuation[: i + 1] for continuation in expected for i in range(depth)}
        assert {path_tokens(tree, node) for node in range(len(tree))} <= prefixes
        assert len(tree) == min(nodes, len(prefixes))


@given(texts, texts)
def test_growing_text_equals_building_anew(first: list[int], second: list[int]) -> None:
    grown = Lookup(first)
    grown.extend(second)
    grown.check()
    assert grown.propose(20, 6) == Lookup(first + second).propose(20, 6)


def test_several_continuations_the_longest_match_first() -> None:
    text = [1, 2, 3, 7, 8, 2, 3, 9, 9, 1, 2, 3]
    tree = Lookup(text).propose(10, 2)
    assert tree.token_ids == (7, 8, 9, 9) and tree.parents == (-1, 0, -1, 2)


def test_a_loop_is_drafted_to_full_depth() -> None:
    assert Lookup([5, 6, 7, 5, 6, 7, 5, 6]).propose(7, 7).token_ids == (7, 5, 6, 7, 5, 6, 7)


def test_a_new_suffix_gives_no_tree_and_damage_is_found() -> None:
    lookup = Lookup([1, 2, 3])
    assert not len(lookup.propose(8, 4)) and not len(Lookup().propose(8, 4))
    lookup.tokens[0] = 9
    with pytest.raises(AssertionError, match="wrong position"):
        lookup.check()
    with pytest.raises(ValueError, match="ngram=0"):
        Lookup(ngram=0)
