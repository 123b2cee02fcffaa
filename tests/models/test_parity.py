"""Every family against transformers in float32: ragged prompts in one flat batch, whole and in chunks, against each
prompt alone."""

from __future__ import annotations

import pytest
import torch

from flexbatch.models import checkpoint
from tests.models.dense import DenseModel
from tests.tiny_models import FAMILY_CASES, make_model, random_prompts

LENGTHS = [1, 37, 5, 150, 64]


@pytest.fixture(scope="module", params=FAMILY_CASES)
def tiny(request, tmp_path_factory):
    """The model of transformers and ours, of one case."""
    folder = tmp_path_factory.mktemp(request.param)
    model = make_model(request.param, folder, tokenizer=False)
    arch = checkpoint.read_arch(folder)
    return model, arch, checkpoint.load(folder, arch, torch.float32)


@torch.no_grad()
def test_logits_equal_transformers(tiny):
    model, arch, stages = tiny
    prompts = random_prompts(LENGTHS)
    wanted = [model(torch.tensor([prompt])).logits[0] for prompt in prompts]
    whole = DenseModel(arch, stages, len(prompts), max(LENGTHS)).step(prompts)
    chunked_model, size = DenseModel(arch, stages, len(prompts), max(LENGTHS)), 23
    chunks = [
        chunked_model.step([prompt[start : start + size] for prompt in prompts])
        for start in range(0, max(LENGTHS), size)
    ]
    chunked = [torch.cat(parts) for parts in zip(*chunks, strict=True)]
    for w, a, b in zip(wanted, whole, chunked, strict=True):
        assert w.std() > 0.3, "logits without gaps would prove nothing"
        torch.testing.assert_close(a, w, atol=5e-5, rtol=1e-5)
        torch.testing.assert_close(b, w, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["falcon-alibi", "falcon-alibi-many", "bloom"])
@torch.no_grad()
def test_linear_biases_of_long_prompts_equal_transformers(case, tmp_path):
    """Falcon's are rounded to bfloat16: positions from 257 on, and the slopes of more than 8 heads."""
    model = make_model(case, tmp_path, tokenizer=False)
    arch = checkpoint.read_arch(tmp_path)
    prompts = random_prompts([450, 300])
    found = DenseModel(arch, checkpoint.load(tmp_path, arch, torch.float32), len(prompts), 450).step(prompts)
    for prompt, logits in zip(prompts, found, strict=True):
        torch.testing.assert_close(logits, model(torch.tensor([prompt])).logits[0], atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_greedy_tokens_equal_generate(tiny):
    model, arch, stages = tiny
    prompts, new = random_prompts([1, 9, 30], seed=1), 6
    dense = DenseModel(arch, stages, len(prompts), 64)
    chunks, generated = prompts, [[] for _ in prompts]
    for _ in range(new):
        chunks = [[logits[-1].argmax().item()] for logits in dense.step(chunks)]
        for tokens, chunk in zip(generated, chunks, strict=True):
            tokens += chunk
    for prompt, tokens in zip(prompts, generated, strict=True):
        wanted = model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None)
        assert wanted[0, len(prompt) :].tolist() == tokens
