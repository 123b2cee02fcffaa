"""The head of greedy passes: the tokens that its logits have, a part of the vocabulary at a time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from flexbatch import LLM, SamplingParams
from flexbatch.execution.head import Head
from flexbatch.execution.sampling import most_likely
from flexbatch.kernels import reference
from flexbatch.kernels.coded_matrix import CodedMatrix
from flexbatch.models import layers
from flexbatch.models.dummy import dummy
from flexbatch.models.families import read_arch
from tests.tiny_models import FAMILY_CASES, make_model, random_prompts

VOCAB = 1100
CASES = ["llama", "opt", "opt-postnorm", "phi", "gemma2", "granitemoe"]


def given(case: str, rows: int = 40) -> tuple[Any, dict[str, Any], torch.Tensor]:
    """Architecture, weights of the head and hidden states. Few bits, so that many logits are equal."""
    kind, config = FAMILY_CASES[case]
    arch = read_arch({"model_type": kind, **config, "vocab_size": VOCAB, "tie_word_embeddings": False})
    weights = {each.role: each.tensor for each in dummy(arch) if each.layer == arch.num_layers}
    draw = torch.Generator().manual_seed(1)
    weights["head.weight"] = torch.randint(-1, 2, weights["head.weight"].shape, generator=draw).float()
    return arch, weights, torch.randint(-1, 2, (rows, arch.hidden_size)).float()


@pytest.mark.parametrize("elements", [1, 40 * 600, 40 * VOCAB])
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_the_logits(case: str, elements: int) -> None:
    arch, weights, hidden = given(case)
    logits = layers.head(arch, weights, hidden)
    found = layers.largest_logits(arch, weights, hidden, elements)
    assert (found is None) == (case in ("gemma2", "granitemoe"))
    if found is not None:
        peaks, token_ids = found
        torch.testing.assert_close(peaks, logits.amax(-1))
        near = logits.gather(1, token_ids[:, None])[:, 0]
        torch.testing.assert_close(near, logits.amax(-1))


def test_of_equal_logits_the_first_is_taken() -> None:
    """Hidden states of one number each, and columns that repeat within and between parts of 256."""
    arch, weights, _ = given("llama")
    weights["head.weight"] = torch.eye(3, arch.hidden_size).repeat(VOCAB // 3 + 1, 1)[:VOCAB].contiguous()
    weights["final_norm.weight"] = torch.ones(arch.hidden_size)
    hidden = torch.zeros(3, arch.hidden_size)
    hidden[0, 2] = hidden[1, 1] = hidden[2, 40] = 1.0
    found = layers.largest_logits(arch, weights, hidden, 1)
    assert found is not None and found[1].tolist() == [2, 1, 0]


@pytest.mark.parametrize("logit_rows", [1, 7, 100])
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("case", ["llama", "gemma2"])
def test_rows_without_finite_logits_have_no_token(case: str, broken: bool, logit_rows: int) -> None:
    arch, weights, hidden = given(case)
    if broken:
        weights["head.weight"][300] = torch.inf
        hidden[3], hidden[5, 0] = torch.nan, torch.inf
    parts = SimpleNamespace(arch=arch, weights=None, ranks=None)
    got = Head(cast(Any, parts), logit_rows).tokens(weights, hidden)
    wanted = most_likely(layers.head(arch, weights, hidden))
    assert torch.equal(got < 0, wanted < 0) and bool((got < 0).any()) == broken


def test_a_head_in_codes_is_multiplied_whole() -> None:
    arch, weights, hidden = given("llama")
    codes, parameters = reference.quantize(weights["head.weight"], 8, 16)
    assert (
        layers.largest_logits(arch, weights | {"head.weight": CodedMatrix(codes, parameters, 8, 16)}, hidden, 9) is None
    )


@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_passes_have_no_logits(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks and decoding, one micro-batch or two: the tokens of passes that have logits."""
    make_model("llama", tmp_path)
    job = random_prompts([5, 90, 3, 30, 17, 8], seed=1)
    greedy = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)
    scored = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True, logprobs=0)
    settings: dict[str, Any] = {"gpu_batch_size": 3, "num_gpu_batches": 2, "prefill_chunk": 16}
    with LLM(str(tmp_path), **settings) as llm:
        plain = [completion.token_ids for completion in llm.generate(job, scored)]
        assert llm.runner is not None
        llm.runner.executor.head.logit_rows = rows
        monkeypatch.setattr(layers, "head", None)
        assert [completion.token_ids for completion in llm.generate(job, greedy)] == plain
