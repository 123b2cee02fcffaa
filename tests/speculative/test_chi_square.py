"""The distribution of sampled tokens that come out of verified trees, end to end."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from flexbatch import SamplingParams
from tests.speculative.engines import engine
from tests.tiny_models import make_tokenizer

TEMPERATURE, TOP_K, TOP_P = 1.4, 6, 0.9
NEW_TOKENS = {800: 40, 1600: 40, 200_000: 200}
"""Tokens of an answer by those that are drawn in all: few draws are of short answers, passes of more cost less."""
BINS = 50


@pytest.fixture(scope="module")
def near(reference, tmp_path_factory):
    """A draft that agrees with the target often and not always: the same weights with noise."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("near")
    model = AutoModelForCausalLM.from_pretrained(reference("llama-single").folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (
                0.1 * parameter.std() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
            )
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def exact(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What is drawn from rows of transformers' logits: probabilities from the likeliest down, [rows, vocab], and
    their tokens."""
    scores = logits.double() / TEMPERATURE
    scores[scores < scores.topk(TOP_K).values[:, -1:]] = -torch.inf
    ordered, order = scores.softmax(-1).sort(descending=True)
    ordered[ordered.cumsum(-1) - ordered >= TOP_P] = 0
    return ordered / ordered.sum(-1, keepdim=True), order


def transforms(model, prompts: list[list[int]], samples: list[list[list[int]]]) -> Tensor:
    """For every drawn token the place of a uniform point of its share of the distribution that it should come from.

    Given all that was drawn before, each is uniform in (0, 1) when the distribution is right (Rosenblatt, 1952), so
    that together they are independent and uniform whatever the contexts were. A token that cannot be drawn is at 2.
    """
    uniform_draws = torch.Generator().manual_seed(0)
    found = []
    for prompt, drawn in zip(prompts, samples, strict=True):
        text = torch.tensor([prompt + tokens for tokens in drawn])
        with torch.no_grad():
            logits = model(text[:, :-1]).logits[:, len(prompt) - 1 :]
        probabilities, order = exact(logits.flatten(0, 1))
        position = (order == text[:, len(prompt) :].reshape(-1, 1)).int().argmax(-1, keepdim=True)
        share = probabilities.gather(1, position)[:, 0]
        below = probabilities.cumsum(-1).gather(1, position)[:, 0] - share
        point = below + share * torch.rand(len(share), generator=uniform_draws, dtype=torch.float64)
        found.append(torch.where(share > 0, point, 2.0))
    return torch.cat(found)


def p_value(points: Tensor) -> float:
    """Of the chi-square test that the points are uniform. Draws that the reference does not know come from its own
    rounding at top-p's edge, if at all."""
    from scipy.stats import chisquare

    known = points[points <= 1]
    assert len(points) - len(known) <= 1e-5 * len(points) + 1, (
        f"{len(points) - len(known)} draws that the target cannot make"
    )
    return float(chisquare(torch.histc(known, BINS, 0, 1).numpy()).pvalue)


def run(reference, near, tmp_path, drawing: str, tree: str, count: int) -> tuple[float, list[list[float]]]:
    """p-value over ``count`` drawn tokens, and the acceptance by position."""
    from transformers import AutoModelForCausalLM

    model, new_tokens = reference("llama-single"), NEW_TOKENS[count]
    generator = random.Random(2)
    prompts = [[generator.randrange(3, 307) for _ in range(length)] for length in (3, 17, 30, 64)]
    params = SamplingParams(
        max_tokens=new_tokens,
        temperature=TEMPERATURE,
        top_k=TOP_K,
        top_p=TOP_P,
        ignore_eos=True,
        n=count // new_tokens // len(prompts),
        seed=5,
    )
    settings = {
        "gpu_batch_size": 250,
        "num_gpu_batches": 1,
        "draft": (str(near),),
        "tree": tree,
        "draft_sampling": drawing,
    }
    with engine(model, tmp_path, **settings) as llm:
        completions = llm.generate(prompts, params)
        positions = llm.report()["speculation"]["acceptance"]["sampled"]["by_position"]
    samples = [[sample.token_ids for sample in completion.samples or [completion]] for completion in completions]
    points = transforms(AutoModelForCausalLM.from_pretrained(model.folder), prompts, samples)
    assert len(points) == count
    return p_value(points), positions


CASES = [("matched", "best-first:5"), ("independent", "<2,2>"), ("without-replacement", "<2,2>"), ("matched", "<2,2>")]
"""Chance needs a tree of fixed shape."""


@pytest.mark.parametrize(
    ("drawing", "tree", "count"),
    [*((*case, 800) for case in CASES[:3]), *(pytest.param(*case, 200_000, marks=pytest.mark.slow) for case in CASES)],
)
def test_chi_square_of_drawn_tokens(drawing, tree, count, reference, near, tmp_path, record_property):
    """Temperature, top-k and top-p, every token in the context of those before it."""
    p, positions = run(reference, near, tmp_path, drawing, tree, count)
    first = [rate for rate in positions[0] if rate is not None]
    assert 0.1 < sum(first[:2]) < 0.95 and first[1] > 0, "both outcomes must be tried"
    record_property("p", p)
    print(f"\n{drawing} {tree}: p = {p:.4f} over {count} draws, accepted at the first place {first}")
    assert p > 1e-3


def test_chi_square_detects_a_wrong_pairing(reference, near, tmp_path, monkeypatch):
    """The likeliest children verified as if drawn independently (SpecInfer's multi-step rule on a top-k tree)."""
    from flexbatch.speculative import draft

    def likeliest_children(logits, state, path, node, count, drawing):
        from flexbatch.execution.sampling import process_logits

        probabilities = process_logits(logits[None], [state], [path])[0].double()
        return [
            (token, 0.0) for token in probabilities.topk(count).indices.tolist() if probabilities[token] > 0
        ], probabilities

    monkeypatch.setattr(draft, "drawn_children", likeliest_children)
    p, _ = run(reference, near, tmp_path, "independent", "<2,2>", 1600)
    assert p < 1e-9
