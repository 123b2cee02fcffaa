"""Speculation through the whole engine: the tokens of plain decoding, whatever the draft, the tree and the tier."""

from __future__ import annotations

import random

import pytest

from flexbatch.speculative.tree import TokenTree, TreeShape, chain
from tests.grids import grid, sampled
from tests.speculative.engines import PLACEMENTS, Scripted, continuation, engine, tokens
from tests.tiny_models import EOS, VOCAB, random_prompts

TREES = ("chain:1", "chain:4", "<1,1,3,1,1>", "<3,2>", "best-first:100", "auto")
DRAFTS = ("other", "target", "both")
CELLS = [
    (placement, TREES[(i + 2 * j) % 6], draft)
    for i, placement in enumerate(PLACEMENTS)
    for j, draft in enumerate(DRAFTS)
]


def drafts_of(name: str, model, other) -> tuple[str, ...]:
    return {"other": (str(other),), "target": (str(model.folder),), "both": (str(other), str(model.folder), "ngram")}[
        name
    ]


@pytest.mark.parametrize(("placement", "tree", "draft"), sampled(CELLS))
def test_greedy_tokens_are_those_of_transformers(placement, tree, draft, reference, other, tmp_path):
    model = reference("llama")
    with engine(model, tmp_path, placement, draft=drafts_of(draft, model, other), tree=tree) as llm:
        assert tokens(llm, model.prompts) == model.token_ids
        report = llm.report()["speculation"]
    if draft == "target" and tree != "auto":
        positions = report["acceptance"]["greedy"]["by_position"]
        assert all(depth[0] in (1.0, None) for depth in positions), "a perfect draft is always accepted"
        assert report["tokens_per_sequence_pass"] > 1.5


@pytest.mark.slow
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_every_tree_on_every_tier(family, placement, tree, draft, reference, other, tmp_path):
    model = reference(family)
    with engine(
        model, tmp_path, placement, draft=drafts_of(draft, model, other), tree=tree, overlap=tree != "<3,2>"
    ) as llm:
        assert tokens(llm, model.prompts) == model.token_ids


@pytest.mark.parametrize(("family", "share", "tree"), grid(["opt", "llama"], [0.5, 1.0], ["<2,2,1>", "best-first:40"]))
def test_trees_attended_on_the_cpu(family, share, tree, reference, tmp_path):
    model = reference(family)
    settings = {"draft": (str(model.folder),), "tree": tree, "overlap": tree == "<2,2,1>"}
    with engine(model, tmp_path, "cpu", cpu_attention=share, **settings) as llm:
        assert tokens(llm, model.prompts) == model.token_ids


@pytest.mark.parametrize(("placement", "cache_bits"), grid(PLACEMENTS, [4, 8]))
def test_compressed_cache_gives_its_own_plain_tokens(placement, cache_bits, reference, tmp_path):
    """Tokens change with the bits, but not with speculation: drafted rows are read as they will be read back."""
    model = reference("llama")
    with engine(model, tmp_path, placement, cache_bits=cache_bits) as llm:
        plain = tokens(llm, model.prompts)
    with engine(model, tmp_path, placement, cache_bits=cache_bits, draft=(str(model.folder),), tree="<2,2,1>") as llm:
        assert tokens(llm, model.prompts) == plain


@pytest.mark.parametrize("placement", ["gpu", pytest.param("cpu", marks=pytest.mark.slow), "disk"])
def test_scripted_drafts(placement, reference, tmp_path):
    """Always wrong, always EOS, a true path hidden in a ragged tree of 100 nodes, one that changes size from pass to
    pass."""
    model = reference("llama")
    generator = random.Random(0)

    def wrong(sequence, depth):
        return chain([(token + 1) % VOCAB for token in continuation(model, sequence)])

    def ends(sequence, depth):
        return TokenTree((EOS, 5, EOS), TreeShape((-1, -1, 1)))

    def hidden(sequence, depth):
        """Nodes of random parents; the true continuation takes random places among them."""
        truth = continuation(model, sequence)[: generator.randrange(1, 6)]
        nodes: list[tuple[int, int]] = []
        last, placed = -1, 0
        while len(nodes) < 100:
            if placed < len(truth) and generator.random() < 0.1:
                node = (last, truth[placed])
                if node in nodes:
                    last, placed = nodes.index(node), placed + 1
                    continue
                last, placed = len(nodes), placed + 1
            else:
                node = (generator.randrange(-1, len(nodes)), generator.randrange(VOCAB))
            if node not in nodes:
                nodes.append(node)
        return TokenTree(tuple(token for _, token in nodes), TreeShape(tuple(parent for parent, _ in nodes)))

    def changing(sequence, depth):
        return generator.choice(
            [wrong, ends, hidden, lambda *_: TokenTree(), lambda *_: chain(continuation(model, sequence))]
        )(sequence, depth)

    with engine(model, tmp_path, placement, draft=("ngram",), tree="best-first:100") as llm:
        for script, low, high in ((wrong, 1.0, 1.0), (ends, 1.0, 1.0), (hidden, 1.5, 6.0), (changing, 1.0, 4.0)):
            totals = llm.speculator.totals
            emitted, passes = totals.emitted_tokens, totals.sequence_passes
            llm.speculator.sources = [Scripted(script)]
            assert tokens(llm, model.prompts) == model.token_ids, script.__name__
            rate = (totals.emitted_tokens - emitted) / (totals.sequence_passes - passes)
            assert low <= rate <= high, (script.__name__, rate)


@pytest.mark.parametrize("placement", ["gpu", "disk"])
def test_shared_prefixes(placement, reference, tmp_path):
    model = reference("llama")
    header = random_prompts([70], seed=3)[0]
    prompts = [header + tail for tail in random_prompts([1, 3, 20, 5, 9, 2, 33, 8], seed=4)]
    with engine(model, tmp_path, placement) as llm:
        plain = tokens(llm, prompts)
    with engine(model, tmp_path, placement, draft=(str(model.folder),), tree="<2,1,1>") as llm:
        assert tokens(llm, prompts) == plain
