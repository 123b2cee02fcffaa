"""Speculation for sampled requests: the very tokens of plain decoding, or its distribution."""

from __future__ import annotations

import pytest

from flexbatch import SamplingParams
from flexbatch.speculative.speculator import Speculator
from flexbatch.validation.errors import ConfigurationError
from tests.grids import grid
from tests.speculative.engines import engine, tokens
from tests.tiny_models import VOCAB

SAMPLED = [
    SamplingParams(max_tokens=14, temperature=0.8, seed=1),
    SamplingParams(max_tokens=14, temperature=1.3, top_k=20, top_p=0.8, seed=2),
    SamplingParams(
        max_tokens=14, temperature=0.0, repetition_penalty=1.3, presence_penalty=0.5, logit_bias={7: 2.0, 9: -5.0}
    ),
    SamplingParams(max_tokens=14, temperature=0.7, min_p=0.05, frequency_penalty=0.4, repetition_penalty=0.9, seed=4),
    SamplingParams(max_tokens=14, temperature=1.0, stop_token_ids=tuple(range(20, 60)), seed=5, logprobs=2),
    SamplingParams(max_tokens=14, temperature=1.0, stop=("a", "q", "zz"), seed=6),
    SamplingParams(max_tokens=14, temperature=0.0, logprobs=3, ignore_eos=True),
    SamplingParams(max_tokens=2, temperature=0.9, seed=7),
    SamplingParams(max_tokens=1, temperature=0.9, seed=8),
    SamplingParams(max_tokens=9, temperature=0.9, n=2, seed=9),
]


@pytest.mark.parametrize(("tree", "draft"), grid(["chain:5", "<2,2,1>", "best-first:12"], ["target", "other"]))
def test_drawn_tokens_are_those_of_plain_decoding(draft, tree, reference, other, tmp_path):
    """The noise of an output token belongs to its place in the request's stream, so that speculation draws the very
    same tokens; a perfect draft, drawing with the same noise, is accepted always, under penalties too."""
    model = reference("llama")
    with engine(model, tmp_path) as llm:
        plain = llm.generate(model.prompts, SAMPLED)
    with engine(model, tmp_path, draft=(str(model.folder if draft == "target" else other),), tree=tree) as llm:
        fast = llm.generate(model.prompts, SAMPLED)
        positions = [llm.report()["speculation"]["acceptance"][group]["by_position"] for group in ("greedy", "sampled")]
    for one, two in zip(plain, fast, strict=True):
        assert (one.token_ids, one.text, one.finish_reason, one.stop_reason) == (
            two.token_ids,
            two.text,
            two.finish_reason,
            two.stop_reason,
        )
        assert [sample.token_ids for sample in one.samples] == [sample.token_ids for sample in two.samples]
        assert (one.logprobs is None) == (two.logprobs is None)
        for a, b in zip(one.logprobs or [], two.logprobs or [], strict=True):
            assert a.keys() == b.keys() and all(abs(a[token].logprob - b[token].logprob) < 1e-4 for token in a)
    if draft == "target":
        assert all(depth[0] in (1.0, None) for group in positions for depth in group)


@pytest.mark.parametrize("drawing", ["independent", "without-replacement"])
def test_trees_drawn_by_chance_do_not_depend_on_the_batch(drawing, reference, other, tmp_path):
    """Draws and coins are the request's own: the same tokens alone and among others, and greedy requests are
    untouched."""
    model = reference("llama")
    with engine(model, tmp_path, draft=(str(other),), tree="<3,2>", draft_sampling=drawing) as llm:
        together = [completion.token_ids for completion in llm.generate(model.prompts, SAMPLED)]
        llm.speculator.check()
        for i in (0, 1, 4):
            assert llm.generate([model.prompts[i]], SAMPLED[i])[0].token_ids == together[i]
        assert tokens(llm, model.prompts) == model.token_ids
    with pytest.raises(ConfigurationError, match="fixed shape"):
        engine(model, tmp_path, draft=(str(other),), tree="best-first:8", draft_sampling=drawing)


@pytest.mark.parametrize("drawing", ["matched", "independent"])
def test_trees_that_blocks_of_logits_cut_are_judged_whole(drawing, reference, other, tmp_path, monkeypatch):
    """A block holds seven rows of the target's logits, a tree has ten; the draft scores three rows at a time, in
    blocks of five, and reads 40 tokens a pass."""
    model = reference("llama")
    settings = {"draft": (str(other),), "tree": "<3,2>", "draft_sampling": drawing}
    with engine(model, tmp_path, **settings) as llm:
        expected = [completion.token_ids for completion in llm.generate(model.prompts, SAMPLED)]
    monkeypatch.setattr("flexbatch.execution.block_sizes.LOGITS_CHUNK_BYTES", 7 * 4 * VOCAB)
    for name, value in {
        "DRAFT_LOGITS_CHUNK_BYTES": 5 * 4 * VOCAB,
        "SCORED_ELEMENTS": 3 * VOCAB,
        "PASS_TOKENS": 40,
    }.items():
        monkeypatch.setattr(f"flexbatch.speculative.draft.{name}", value)
    verified_whole = []
    judge = Speculator.verify
    monkeypatch.setattr(
        Speculator,
        "verify",
        lambda self, query, logits: verified_whole.append(len(logits)) or judge(self, query, logits),
    )
    with engine(model, tmp_path, **settings) as llm:
        assert [completion.token_ids for completion in llm.generate(model.prompts, SAMPLED)] == expected
        llm.speculator.check()
    assert (max(verified_whole, default=0) > 7) == (drawing == "independent")
