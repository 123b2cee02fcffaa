"""Token trees: invariants, masks, merging, pruning."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.kernels import attention_reference
from flexbatch.speculative.tree import ROOT, Drawing, TokenTree, TreeShape, best_first, chain, merge
from tests.speculative.tree_paths import path_tokens, query_masks


@st.composite
def trees(draw, max_nodes: int = 90, vocab: int = 200, logprobs: bool = True) -> TokenTree:
    """Any deterministic tree: a random parent for each node, tokens distinct among siblings."""
    nodes: list[tuple[int, int]] = []
    for _ in range(draw(st.integers(0, max_nodes))):
        node = (draw(st.integers(-1, len(nodes) - 1)), draw(st.integers(0, vocab - 1)))
        if node not in nodes:
            nodes.append(node)
    values = tuple(draw(st.floats(-8, 0)) for _ in nodes) if logprobs else None
    return TokenTree(tuple(token for _, token in nodes), TreeShape(tuple(parent for parent, _ in nodes)), values)


def paths(tree: TokenTree) -> set[tuple[int, ...]]:
    return {path_tokens(tree, node) for node in range(len(tree))}


@settings(deadline=None)
@given(trees())
def test_shape_agrees_with_walking_up(tree: TokenTree) -> None:
    shape = tree.shape
    for node, parent in enumerate(tree.parents):
        path = shape.path(node)
        assert path[-1] == node and len(path) == shape.depths[node]
        assert path[:-1] == shape.path(parent)
        siblings = [i for i in range(len(tree)) if tree.parents[i] == parent]
        assert list(shape.children[parent + 1]) == siblings and siblings[shape.ranks[node]] == node
        assert tree.child(parent + 1, tree.token_ids[node]) == node
    assert sum(map(len, shape.children)) == len(tree)
    assert tree.query_tokens(7) == (7, *tree.token_ids)


@settings(deadline=None)
@given(trees(logprobs=False))
def test_masks_hold_exactly_the_ancestors(tree: TokenTree) -> None:
    masks = query_masks(tree.shape)
    rows = len(tree) + 1
    assert masks.dtype == np.int32 and masks.shape == (rows, -(-rows // 32))
    bits = (masks.view(np.uint32)[:, np.arange(rows) // 32] >> (np.arange(rows) % 32).astype(np.uint32)) & 1
    for row in range(rows):
        seen = {0, row, *(node + 1 for node in tree.shape.path(row - 1))}
        assert set(np.flatnonzero(bits[row]).tolist()) == seen
    spare = rows % 32
    assert not spare or not (masks.view(np.uint32)[:, -1] >> np.uint32(spare)).any(), (
        "bits beyond the last token must be zero"
    )


def test_a_chain_is_causal_beyond_one_word() -> None:
    masks = query_masks(chain(list(range(99))).shape)
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, :100]
    assert np.array_equal(bits, np.tril(np.ones((100, 100), dtype=np.uint8)))


@settings(max_examples=25, deadline=None)
@given(trees(max_nodes=70), st.integers(1, 9), st.integers(0, 2**31 - 1))
def test_tree_attention_equals_attention_over_each_path(tree: TokenTree, prefix: int, seed: int) -> None:
    """The masks and depths, through the attention oracle, against plain causal attention over prefix + path (with
    ALiBi and a window)."""
    generator = torch.Generator().manual_seed(seed)
    rows, page, heads, kv_heads, dim = len(tree) + 1, 4, 4, 2, 8
    query, key, value = (torch.randn(prefix + rows, h, dim, generator=generator) for h in (heads, kv_heads, kv_heads))
    settings_ = {
        "num_kv_heads": kv_heads,
        "page_tokens": page,
        "scale": dim**-0.5,
        "alibi_slopes": torch.tensor([0.5, 0.3, 0.2, 0.1]),
        "window": 6,
    }

    def attend(slots: list[int], queries: int, **extra) -> torch.Tensor:
        pages = -(-len(slots) // page)
        cache = torch.zeros(pages * page, 2, kv_heads, dim)
        cache[: len(slots)] = torch.stack([key[slots], value[slots]], dim=1)
        table, starts = torch.arange(pages, dtype=torch.int32)[None], torch.tensor([0, queries], dtype=torch.int32)
        lens = torch.tensor([len(slots)], dtype=torch.int32)
        return attention_reference.paged_attention(
            query[slots[len(slots) - queries :]], cache, table, starts, lens, **settings_, **extra
        )

    masks = torch.from_numpy(query_masks(tree.shape))
    positions = torch.tensor([prefix + depth for depth in (0, *tree.depths)], dtype=torch.int32)
    together = attend(list(range(prefix + rows)), rows, tree_masks=masks, positions=positions)
    for node in range(-1, len(tree)):
        path = [0, *(i + 1 for i in tree.shape.path(node))]
        alone = attend([*range(prefix), *(prefix + row for row in path)], len(path))
        torch.testing.assert_close(together[path], alone, rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(st.lists(trees(max_nodes=12, vocab=3), max_size=4))
def test_merge_holds_every_path_once(several: list[TokenTree]) -> None:
    merged = merge(several)
    assert paths(merged) == set().union(*map(paths, several)) and len(paths(merged)) == len(merged)
    best: dict[tuple[int, ...], float] = {}
    for tree in several:
        for node in range(len(tree)):
            assert tree.logprobs is not None
            path = path_tokens(tree, node)
            best[path] = max(best.get(path, -np.inf), tree.logprobs[node])
    assert {path_tokens(merged, node): (merged.logprobs or ())[node] for node in range(len(merged))} == best
    assert merge([merged, *several]) == merged


@settings(deadline=None)
@given(st.lists(trees(max_nodes=12, vocab=3), max_size=4), st.integers(0, 12))
def test_bounded_merge_prefers_the_first_trees(several: list[TokenTree], budget: int) -> None:
    whole, part = merge(several), merge(several, budget)
    assert len(part) == min(budget, len(whole))
    assert part.token_ids == whole.token_ids[: len(part)] and part.parents == whole.parents[: len(part)]


def test_beams_share_their_prefix() -> None:
    merged = merge([chain([5, 6, 7]), chain([5, 6, 8]), chain([5, 9])])
    assert merged.token_ids == (5, 6, 7, 8, 9) and merged.parents == (-1, 0, 1, 1, 0)


@settings(deadline=None)
@given(trees(), st.integers(0, 90))
def test_best_first_keeps_the_likeliest_closed_set(tree: TokenTree, budget: int) -> None:
    kept = best_first(tree, budget)
    assert len(kept) == min(budget, len(tree)) and paths(kept) <= paths(tree)
    assert sum(np.exp(kept.path_logprobs)) == pytest.approx(
        sum(sorted(np.exp(tree.path_logprobs), reverse=True)[:budget])
    )


@settings(deadline=None)
@given(trees(), st.integers(0, 6))
def test_cut_removes_exactly_what_is_too_deep(tree: TokenTree, depth: int) -> None:
    assert paths(tree.cut(depth)) == {path for path in paths(tree) if len(path) <= depth}


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: TreeShape((0,)), "parent 0"),
        (lambda: TreeShape((-1, -2)), "parent -2"),
        (lambda: TokenTree((1, 2), TreeShape((-1,))), "1 nodes, 2 tokens"),
        (lambda: TokenTree((1,), TreeShape((-1,)), (0.0, 0.0)), "2 logprobs"),
        (lambda: TokenTree((-1,), TreeShape((-1,))), "negative"),
        (lambda: TokenTree((1,), TreeShape((-1,)), (0.5,)), "at most 0"),
        (lambda: TokenTree((1,), TreeShape((-1,)), (float("nan"),)), "at most 0"),
        (lambda: TokenTree((3, 3), TreeShape((-1, -1))), "siblings repeat"),
        (lambda: TokenTree((3, 3), TreeShape((-1, -1)), None, Drawing.WITHOUT_REPLACEMENT), "siblings repeat"),
        (lambda: chain([1, 2, 3]).subtree([1, 2]), "without its parent"),
        (lambda: merge([TokenTree((1,), TreeShape((-1,)), None, Drawing.INDEPENDENT)]), "only deterministic"),
        (lambda: chain([1, 2]).path_logprobs, "no draft probabilities"),
    ],
)
def test_wrong_trees_are_refused(build, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


def test_independent_siblings_may_repeat_and_empty_trees_are_plain_decoding() -> None:
    tree = TokenTree((3, 3), TreeShape((-1, -1)), None, Drawing.INDEPENDENT)
    assert tree.child(0, 3) == 0 and tree.child(0, 4) is None
    empty = TokenTree()
    assert empty.query_tokens(9) == (9,) and query_masks(empty.shape).tolist() == [[1]] and empty.shape.path(ROOT) == ()
