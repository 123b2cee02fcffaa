"""Tree syntax, fixed widths, and the dynamic program against brute force and against greedy growth."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.speculative.shapes import StaticTrees, fixed_widths
from flexbatch.speculative.tree import ROOT, TreeShape
from flexbatch.speculative.tree_spec import TreeSpec, parse_tree
from flexbatch.validation.errors import ConfigurationError


def expected_tokens(shape: TreeShape, acceptance: Sequence[Sequence[float]]) -> float:
    """Tokens per pass that ``shape`` commits on average under an acceptance table (see `StaticTrees`), the one after
    the path included."""
    reached: list[float] = []
    for parent, depth, rank in zip(shape.parents, shape.depths, shape.ranks, strict=True):
        inside = depth <= len(acceptance) and rank < len(acceptance[depth - 1])
        reached.append((1.0 if parent == ROOT else reached[parent]) * (acceptance[depth - 1][rank] if inside else 0.0))
    return 1 + sum(reached)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("chain:3", TreeSpec("widths", (1, 1, 1), 3)),
        ("<1,1,3,1,1>", TreeSpec("widths", (1, 1, 3, 1, 1), 11)),
        (" < 2, 2 > ", TreeSpec("widths", (2, 2), 6)),
        ("best-first:100", TreeSpec("best-first", (), 100)),
        ("auto", TreeSpec("auto")),
    ],
)
def test_syntax(text: str, spec: TreeSpec) -> None:
    assert parse_tree(text) == spec


@pytest.mark.parametrize(
    "text", ["", "chain", "chain:0", "chain:-1", "best-first:x", "<>", "<1,0>", "1,2", "<1,2", "beam:3"]
)
def test_wrong_syntax_names_the_text_and_a_remedy(text: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        parse_tree(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("digits", ["1025", "99999999", "9" * 5000])
@pytest.mark.parametrize("form", ["chain:{}", "best-first:{}", "<{}>", "<1, {}>", "<{0},{0},{0}>"])
def test_a_tree_too_large_to_draw_is_refused(form: str, digits: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^tree '.{1,45}' has more than 1,024 nodes"):
        parse_tree(form.format(digits))
    assert parse_tree(form.format(1)).nodes < parse_tree(form.format(9)).nodes < 1024


def test_fixed_widths_of_specinfer() -> None:
    shape = fixed_widths((1, 1, 3, 1, 1))
    assert shape.depths == (1, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5) and shape.parents == (-1, 0, 1, 1, 1, 2, 3, 4, 5, 6, 7)
    assert fixed_widths(()) == TreeShape()


@st.composite
def tables(draw, max_depth: int = 3, max_rank: int = 3, falling: bool = False) -> tuple[tuple[float, ...], ...]:
    ranks = draw(st.integers(1, max_rank))
    rows = []
    for _ in range(draw(st.integers(1, max_depth))):
        row = [draw(st.floats(0, 1)) for _ in range(ranks)]
        scale = max(1.0, sum(row)) * (1 + 1e-12)
        row = [value / scale for value in row]
        rows.append(tuple(sorted(row, reverse=True) if falling else row))
    return tuple(rows)


def every_shape(nodes: int):
    """All shapes of up to ``nodes`` nodes."""
    for size in range(nodes + 1):
        yield from (TreeShape(parents) for parents in product(*(range(-1, i) for i in range(size))))


SMALL = list(every_shape(5))


@settings(max_examples=60, deadline=None)
@given(tables(), st.integers(0, 5))
def test_dynamic_program_equals_brute_force(table, nodes: int) -> None:
    best = max(expected_tokens(shape, table) for shape in SMALL if len(shape) <= nodes)
    trees = StaticTrees(table, 5)
    assert trees.expected_tokens[nodes] == pytest.approx(best, abs=1e-12)
    shape = trees.shape(nodes)
    assert len(shape) <= nodes and expected_tokens(shape, table) == pytest.approx(best, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(tables(max_depth=6, max_rank=4, falling=True), st.integers(0, 40))
def test_with_falling_ranks_it_equals_greedy_growth_and_gains_fall(table, nodes: int) -> None:
    """A child's worth is the product of acceptances on its path; with ranks falling, the best tree is the most
    worthy nodes."""
    worths, level = [], [1.0]
    for row in table:
        level = sorted((worth * chance for worth in level for chance in row), reverse=True)[: nodes + 1]
        worths += level
    trees = StaticTrees(table, 40)
    assert trees.expected_tokens[nodes] == pytest.approx(1 + sum(sorted(worths, reverse=True)[:nodes]))
    gains = trees.expected_tokens[1:] - trees.expected_tokens[:-1]
    assert (gains[1:] <= gains[:-1] + 1e-12).all()
    assert expected_tokens(trees.shape(nodes), table) == pytest.approx(trees.expected_tokens[nodes])


def test_a_chain_where_only_the_first_child_is_ever_accepted() -> None:
    trees = StaticTrees(((0.8, 0.0),) * 4, 10)
    assert trees.shape(10) == TreeShape((-1, 0, 1, 2))
    assert trees.expected_tokens[10] == pytest.approx(1 + 0.8 + 0.64 + 0.512 + 0.4096)


@pytest.mark.parametrize("table", [((0.6, 0.5),), ((-0.1,),), ((0.5,), (0.5, 0.1))])
def test_tables_that_are_no_probabilities_are_refused(table) -> None:
    with pytest.raises(ValueError, match="acceptance at depth"):
        StaticTrees(table, 4)
