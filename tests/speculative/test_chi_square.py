"""The distribution of sampled tokens that come out of verified trees, end to end."""

from __future__ import annotations

import pytest
import torch

from flexbatch import SamplingParams
from tests.speculative.engines import engine
from tests.tiny_models import make_tokenizer


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
