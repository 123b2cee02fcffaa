"""Speculation through the whole engine: the tokens of plain decoding, whatever the draft, the tree and the tier."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from flexbatch import LLM, SamplingParams
from flexbatch.config import ConfigurationError
from flexbatch.execution.batcher import Batcher
from flexbatch.speculative.tree import TokenTree, TreeShape, chain
from tests.engine.conftest import NEW_TOKENS
from tests.tiny_models import EOS, VOCAB, make_model, make_tokenizer, random_prompts

GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0)
PLACES = {
    "gpu": (100, 0, 100, 0, 100, 0),
    "cpu": (0, 100, 0, 100, 0, 100),
    "disk": (0, 0, 0, 0, 100, 0),
    "mixed": (30, 40, 40, 30, 30, 40),
}
TREES = ("chain:1", "chain:4", "<1,1,3,1,1>", "<3,2>", "best-first:100", "auto")


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """A draft of another shape with other weights: it agrees with the target about as often as chance does."""
    folder = tmp_path_factory.mktemp("other")
    make_model("llama-single", folder, seed=9)
    return folder


class Scripted:
    """A draft that proposes whatever ``make(sequence, max_depth)`` says."""

    name = "scripted"

    def __init__(self, make) -> None:
        self.make = make
        self.peak_bytes = 0
        self.distributions: dict = {}

    def draft(self, sequences, plans):
        return [self.make(sequence, plan.num_levels).cut(plan.num_levels) for sequence, plan in zip(sequences, plans, strict=True)]

    def retire(self, sequence) -> None:
        pass

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


def engine(model, tmp_path, place="gpu", **settings) -> LLM:
    common = {"gpu_batch_size": 3, "num_gpu_batches": 2, "gpu_memory": "1GiB", "cpu_memory": "1GiB", "device": "cpu", "prefill_chunk": 50}
    return LLM(str(model.folder), percent=PLACES[place], offload_dir=str(tmp_path), **{**common, **settings})


def tokens(llm: LLM, prompts, params=GREEDY) -> list[list[int]]:
    completions = llm.generate(prompts, params)
    if llm.speculator is not None:
        llm.speculator.check()
    llm.block.check()
    return [completion.token_ids for completion in completions]


@pytest.mark.parametrize(("place", "tree"), [(place, tree) for i, place in enumerate(PLACES) for tree in (TREES[i % 6], TREES[(i + 3) % 6])])
@pytest.mark.parametrize("draft", ["other", "target", "both"])
def test_greedy_tokens_are_those_of_transformers(place, tree, draft, reference, other, tmp_path):
    model = reference("llama")
    drafts = {"other": (str(other),), "target": (str(model.folder),), "both": (str(other), str(model.folder), "ngram")}[draft]
    with engine(model, tmp_path, place, draft=drafts, tree=tree) as llm:
        assert tokens(llm, model.prompts) == model.token_ids
        report = llm.report()["speculation"]
    if draft == "target" and tree != "auto":
        positions = report["acceptance"]["greedy"]["by_position"]
        assert all(depth[0] in (1.0, None) for depth in positions), "a perfect draft is always accepted"
        assert report["tokens_per_sequence_pass"] > 1.5


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_trees_attended_on_the_cpu(share, family, reference, tmp_path):
    model = reference(family)
    with engine(model, tmp_path, "cpu", cpu_attention=share, draft=(str(model.folder),), tree="<2,2,1>") as llm:
        assert tokens(llm, model.prompts) == model.token_ids
    with engine(model, tmp_path, "cpu", cpu_attention=share, draft=(str(model.folder),), tree="best-first:40", overlap=False) as llm:
        assert tokens(llm, model.prompts) == model.token_ids


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("cache_bits", [4, 8])
def test_compressed_cache_gives_its_own_plain_tokens(place, cache_bits, reference, tmp_path):
    """Tokens change with the bits, but not with speculation: drafted rows are read as they will be read back."""
    model = reference("llama")
    with engine(model, tmp_path, place, cache_bits=cache_bits) as llm:
        plain = tokens(llm, model.prompts)
    with engine(model, tmp_path, place, cache_bits=cache_bits, draft=(str(model.folder),), tree="<2,2,1>") as llm:
        assert tokens(llm, model.prompts) == plain


def continuation(model, sequence) -> list[int]:
    """What the target will generate next."""
    index = model.prompts.index(sequence.token_ids[: sequence.num_prompt_tokens])
    return model.token_ids[index][len(sequence.output.token_ids) :]


@pytest.mark.parametrize("place", ["gpu", "cpu", "disk"])
def test_scripted_drafts(place, reference, tmp_path):
    """Always wrong, always EOS, a true path hidden in a ragged tree of 100 nodes, one that changes size from pass to pass."""
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
        return generator.choice([wrong, ends, hidden, lambda *_: TokenTree(), lambda *_: chain(continuation(model, sequence))])(sequence, depth)

    with engine(model, tmp_path, place, draft=("ngram",), tree="best-first:100") as llm:
        for script, low, high in ((wrong, 1.0, 1.0), (ends, 1.0, 1.0), (hidden, 1.5, 6.0), (changing, 1.0, 4.0)):
            totals = llm.speculator.totals
            emitted, passes = totals.emitted_tokens, totals.sequence_passes
            llm.speculator.sources = [Scripted(script)]
            assert tokens(llm, model.prompts) == model.token_ids, script.__name__
            rate = (totals.emitted_tokens - emitted) / (totals.sequence_passes - passes)
            assert low <= rate <= high, (script.__name__, rate)


@pytest.mark.parametrize("place", ["gpu", "disk"])
def test_shared_prefixes(place, reference, tmp_path):
    model = reference("llama")
    header = random_prompts([70], seed=3)[0]
    prompts = [header + tail for tail in random_prompts([1, 3, 20, 5, 9, 2, 33, 8], seed=4)]
    with engine(model, tmp_path, place) as llm:
        plain = tokens(llm, prompts)
    with engine(model, tmp_path, place, draft=(str(model.folder),), tree="<2,1,1>") as llm:
        assert tokens(llm, prompts) == plain


SAMPLED = [
    SamplingParams(max_tokens=14, temperature=0.8, seed=1),
    SamplingParams(max_tokens=14, temperature=1.3, top_k=20, top_p=0.8, seed=2),
    SamplingParams(max_tokens=14, temperature=0.0, repetition_penalty=1.3, presence_penalty=0.5, logit_bias={7: 2.0, 9: -5.0}),
    SamplingParams(max_tokens=14, temperature=0.7, min_p=0.05, frequency_penalty=0.4, repetition_penalty=0.9, seed=4),
    SamplingParams(max_tokens=14, temperature=1.0, stop_token_ids=tuple(range(20, 60)), seed=5, logprobs=2),
    SamplingParams(max_tokens=14, temperature=1.0, stop=("a", "q", "zz"), seed=6),
    SamplingParams(max_tokens=14, temperature=0.0, logprobs=3, ignore_eos=True),
    SamplingParams(max_tokens=2, temperature=0.9, seed=7),
    SamplingParams(max_tokens=1, temperature=0.9, seed=8),
    SamplingParams(max_tokens=9, temperature=0.9, n=2, seed=9),
]


@pytest.mark.parametrize("draft", ["target", "other"])
@pytest.mark.parametrize("tree", ["chain:5", "<2,2,1>", "best-first:12"])
def test_drawn_tokens_are_those_of_plain_decoding(draft, tree, reference, other, tmp_path):
    """The noise of an output token belongs to its place in the request's stream, so that speculation draws the very same tokens; a perfect draft, drawing
    with the same noise, is accepted always, under penalties too."""
    model = reference("llama")
    with engine(model, tmp_path) as llm:
        plain = llm.generate(model.prompts, SAMPLED)
    with engine(model, tmp_path, draft=(str(model.folder if draft == "target" else other),), tree=tree) as llm:
        fast = llm.generate(model.prompts, SAMPLED)
        positions = [llm.report()["speculation"]["acceptance"][group]["by_position"] for group in ("greedy", "sampled")]
    for one, two in zip(plain, fast, strict=True):
        assert (one.token_ids, one.text, one.finish_reason, one.stop_reason) == (two.token_ids, two.text, two.finish_reason, two.stop_reason)
        assert [sample.token_ids for sample in one.samples] == [sample.token_ids for sample in two.samples]
        assert (one.logprobs is None) == (two.logprobs is None)
        for a, b in zip(one.logprobs or [], two.logprobs or [], strict=True):
            assert a.keys() == b.keys() and all(abs(a[token].logprob - b[token].logprob) < 1e-4 for token in a)
    if draft == "target":
        assert all(depth[0] in (1.0, None) for group in positions for depth in group)


def capture(monkeypatch, rows: dict) -> None:
    """Keep every sequence's cached rows as it retires: tokens -> [layers, tokens, ...]."""
    retire = Batcher.retire

    def keep(self, sequence) -> None:
        cache, table, layout = self.cache, sequence.table, self.cache.layout
        cache.synchronize()
        found = []
        for layer in range(layout.num_layers):
            if table.tier == "disk":
                pages = torch.zeros(layout.num_pages(table.num_tokens), layout.page_bytes, dtype=torch.uint8)
                cache.disk.read([(table, table.num_tokens)], layer, pages, cache.lanes.disk_chunks)
                found.append(layout.row_view(pages.view(-1))[: table.num_tokens].clone())
            else:
                found.append(cache.rows(table.tier, layer)[table.slots(0, table.num_tokens, layout.page_tokens)].clone())
        rows[tuple(sequence.token_ids[: table.num_tokens])] = torch.stack(found)
        retire(self, sequence)

    monkeypatch.setattr(Batcher, "retire", keep)


@pytest.mark.parametrize("place", PLACES)
def test_the_cache_after_commit_equals_a_fresh_prefill(place, reference, tmp_path, monkeypatch):
    model = reference("llama")
    kept: dict[tuple[int, ...], torch.Tensor] = {}
    capture(monkeypatch, kept)
    generator = random.Random(1)

    def branching(sequence, depth):
        """The truth behind a wrong sibling at every depth, so that every accepted row has to move."""
        truth = continuation(model, sequence)[: generator.randrange(1, 5)]
        nodes, parents, last = [], [], -1
        for token in truth:
            parents += [last, last]
            nodes += [(token + 1) % VOCAB, token]
            last = len(nodes) - 1
        return TokenTree(tuple(nodes), TreeShape(tuple(parents)))

    with engine(model, tmp_path, place, draft=("ngram",), tree="best-first:20") as llm:
        llm.speculator.sources = [Scripted(branching)]
        assert tokens(llm, model.prompts) == model.token_ids
        assert llm.report()["speculation"]["tokens_per_sequence_pass"] > 2
    committed, texts = dict(kept), list(kept)
    kept.clear()
    with engine(model, tmp_path, place, prefill_chunk=300) as llm:
        llm.generate([list(text) for text in texts], SamplingParams(max_tokens=1, temperature=0))
    for text in texts:
        torch.testing.assert_close(committed[text], kept[text], rtol=1e-4, atol=1e-4)


def test_simulated_acceptance_is_labelled(reference, other, tmp_path):
    model = reference("llama")
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, logprobs=1)
    with engine(model, tmp_path, draft=(str(other),), tree="chain:4", simulate_acceptance=0.8) as llm:
        completions = llm.generate(model.prompts, params)
        report = llm.report()["speculation"]
    assert report["simulated_acceptance"] == 0.8
    assert all(len(completion.token_ids) == len(completion.logprobs) == 40 for completion in completions)
    # 1 + 0.8 + 0.8^2 + 0.8^3 + 0.8^4 = 3.36, less what the ends cut off.
    assert 2.7 < report["tokens_per_sequence_pass"] < 3.7


def test_compare_plain_measures_both_in_one_run(reference, tmp_path):
    model = reference("llama")
    with engine(model, tmp_path, draft=(str(model.folder),), tree="chain:3", compare_plain=True) as llm:
        assert tokens(llm, model.prompts) == model.token_ids
        report = llm.report()
    speculation = report["speculation"]
    assert speculation["plain_passes"] > report["passes"] and speculation["speed_up"] > 0
    assert report["requests"] == len(model.prompts), "the plain run is not counted twice"


def test_wrong_settings_are_refused_before_anything_is_loaded(reference, tmp_path):
    model = reference("llama")
    strange = tmp_path / "strange"
    make_model("llama", strange, vocab_size=310, seed=1)
    make_tokenizer(310).save_pretrained(strange)
    (strange / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ConfigurationError, match=r"different tokenizers \(310 and 307 tokens"):
        engine(model, tmp_path, draft=(str(strange),))
    with pytest.raises(ConfigurationError, match="needs a draft"):
        engine(model, tmp_path, tree="chain:3")
    with pytest.raises(ConfigurationError, match="needs a draft"):
        engine(model, tmp_path, simulate_acceptance=0.5)
    with pytest.raises(ConfigurationError, match="not a tree"):
        engine(model, tmp_path, draft=("ngram",), tree="bush:3")
    with pytest.raises(ConfigurationError, match="between 0 and 1"):
        engine(model, tmp_path, draft=("ngram",), simulate_acceptance=1.5)


def test_an_abandoned_job_leaves_nothing_behind(reference, tmp_path):
    model = reference("llama")
    with engine(model, tmp_path, draft=(str(model.folder), "ngram"), tree="chain:2") as llm:
        items = ((i, prompt, GREEDY) for i, prompt in enumerate(model.prompts))
        stream = llm.stream(items)
        next(stream)
        stream.close()
        assert not llm.speculator.sources[0].followed and not llm.speculator.sources[1].lookups
        assert tokens(llm, model.prompts) == model.token_ids


@pytest.mark.parametrize("drawing", ["independent", "without-replacement"])
def test_trees_drawn_by_chance_do_not_depend_on_the_batch(drawing, reference, other, tmp_path):
    """Draws and coins are the request's own: the same tokens alone and among others, and greedy requests are untouched."""
    model = reference("llama")
    with engine(model, tmp_path, draft=(str(other),), tree="<3,2>", draft_sampling=drawing) as llm:
        together = [completion.token_ids for completion in llm.generate(model.prompts, SAMPLED)]
        llm.speculator.check()
        for i in (0, 1, 4):
            assert llm.generate([model.prompts[i]], SAMPLED[i])[0].token_ids == together[i]
        assert tokens(llm, model.prompts) == model.token_ids
    with pytest.raises(ConfigurationError, match="fixed shape"):
        engine(model, tmp_path, draft=(str(other),), tree="best-first:8", draft_sampling=drawing)


def distribution(model, prompt, params: SamplingParams, length: int) -> dict[tuple[int, ...], float]:
    """Exact probabilities of the first tokens, from transformers' logits."""
    found = {(): 1.0}
    for _ in range(length):
        longer = {}
        for path, weight in found.items():
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *path]])).logits[0, -1].double() / params.temperature
            logits[logits < logits.topk(params.top_k).values[-1]] = -torch.inf
            ordered, order = logits.softmax(-1).sort(descending=True)
            ordered[ordered.cumsum(0) - ordered >= params.top_p] = 0
            for token, probability in zip(order.tolist(), (ordered / ordered.sum()).tolist(), strict=True):
                if probability > 0:
                    longer[(*path, token)] = weight * probability
        found = longer
    return found


@pytest.mark.parametrize("count", [3000, pytest.param(200_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("drawing", ["matched", "independent", "without-replacement"])
def test_chi_square_of_drawn_tokens(count, drawing, reference, tmp_path_factory, tmp_path):
    """The joint distribution of two tokens, of which the second comes out of a verified tree, against exact probabilities."""
    from collections import Counter

    from scipy.stats import chisquare
    from transformers import AutoModelForCausalLM

    model = reference("llama-single")
    draft = tmp_path_factory.mktemp("near")
    near = AutoModelForCausalLM.from_pretrained(model.folder)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    near.save_pretrained(draft)
    make_tokenizer().save_pretrained(draft)
    prompt = model.prompts[2]
    params = SamplingParams(max_tokens=3, temperature=1.4, top_k=6, top_p=0.9, ignore_eos=True, n=count, seed=5)
    exact = distribution(AutoModelForCausalLM.from_pretrained(model.folder), prompt, params, 2)
    with engine(model, tmp_path, gpu_batch_size=256, num_gpu_batches=1, draft=(str(draft),), tree="<2,1>", draft_sampling=drawing) as llm:
        completion = llm.generate([prompt], params)[0]
        accepted = llm.report()["speculation"]["acceptance"]["sampled"]["by_position"][0]
    assert 0.1 < sum(accepted[:2]) < 0.95 and accepted[1] > 0, "both outcomes must be tried"
    seen = Counter(tuple(sample.token_ids[:2]) for sample in completion.samples)
    assert set(seen) <= set(exact)
    likely = [path for path, probability in exact.items() if probability * count >= 5]
    rest = 1 - sum(exact[path] for path in likely)
    observed = [*(seen[path] for path in likely), count - sum(seen[path] for path in likely)]
    expected = [*(exact[path] * count for path in likely), rest * count]
    if rest * count < 1e-6:
        observed, expected = observed[:-1], expected[:-1]
    assert chisquare(observed, expected, sum_check=False).pvalue > 1e-4


HUMANEVAL = Path(__file__).parents[3] / "shared" / "data" / "humaneval.jsonl"


@pytest.mark.skipif(not HUMANEVAL.exists(), reason="needs the shared data")
@pytest.mark.parametrize("draft", [("demo-draft",), ("ngram",), ("demo-draft", "ngram")], ids=" ".join)
def test_the_demo_pair_saves_passes_on_real_prompts(draft, tmp_path):
    """Weights on disk; the ratio of seconds is reported, and asserted nowhere: it belongs to the machine."""
    prompts = [json.loads(line)["prompt"] for line in HUMANEVAL.read_text().splitlines()[:6]]
    settings = {"percent": (0, 0, 100, 0, 100, 0), "gpu_batch_size": 6, "num_gpu_batches": 1, "offload_dir": str(tmp_path), "device": "cpu"}
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    with LLM("demo", gpu_memory="1GiB", cpu_memory="1GiB", draft=draft, tree="chain:4", compare_plain=True, **settings) as llm:
        fast = [completion.token_ids for completion in llm.generate(prompts, params)]
        report = llm.report()
    with LLM("demo", gpu_memory="1GiB", cpu_memory="1GiB", **settings) as llm:
        assert [completion.token_ids for completion in llm.generate(prompts, params)] == fast
    run = report["speculation"]
    assert run["tokens_per_sequence_pass"] > 1.3 and report["passes"] < 0.9 * run["plain_passes"] and run["speed_up"] > 0
