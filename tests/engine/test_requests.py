"""What a request asks for belongs to the request: penalties, streams and scores, at any placement, in any company,
after a restart; against transformers."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from flexbatch import LLM, SamplingParams
from flexbatch.execution import head as head_of_passes
from flexbatch.policy.limits import MIN_LOGIT_ROWS
from tests.grids import grid
from tests.tiny_models import make_model, make_tokenizer, random_prompts

PLACEMENTS = ((100, 0, 100, 0, 100, 0), (30, 40, 40, 30, 50, 50), (0, 0, 0, 0, 0, 100))
PARAMS = (
    SamplingParams(max_tokens=9, temperature=0.9, presence_penalty=-2.0, frequency_penalty=-1.5, seed=4),
    SamplingParams(max_tokens=9, temperature=0, repetition_penalty=0.4),
    SamplingParams(
        max_tokens=9, temperature=1.2, min_p=0.05, frequency_penalty=0.8, logit_bias={7: 2.0, 9: -100.0}, top_k=40
    ),
    SamplingParams(max_tokens=9, temperature=0.8, top_p=0.8, repetition_penalty=1.3, n=3),
)
PROMPTS = random_prompts([2, 30, 17, 90, 5, 33, 64, 8], seed=11)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("requests")
    make_model("llama", folder)
    return folder


def start(folder, tmp_path, percent, **settings):
    budgets = {"gpu_memory": "1GiB", "cpu_memory": "1GiB", "offload_dir": str(tmp_path)}
    return LLM(
        str(folder), device="cpu", percent=percent, **{"gpu_batch_size": 3, "num_gpu_batches": 2, **budgets, **settings}
    )


def tokens(completions):
    return [[sample.token_ids for sample in completion.samples or [completion]] for completion in completions]


def test_penalties_and_streams_belong_to_the_request(folder, tmp_path):
    """Every placement is a new start; the job's order is kept, as streams without a seed belong to the place in the
    job."""
    params = [PARAMS[i % len(PARAMS)] for i in range(len(PROMPTS))]
    with start(folder, tmp_path, PLACEMENTS[0]) as llm:
        wanted = tokens(llm.generate(PROMPTS, params))
        alone = tokens(llm.generate(PROMPTS[:1], params[0])) + tokens(llm.generate(PROMPTS[1:2], params[1]))
        plain = tokens(
            llm.generate(
                PROMPTS, [SamplingParams(max_tokens=9, temperature=p.temperature, seed=p.seed, n=p.n) for p in params]
            )
        )
    assert alone == wanted[:2]
    for kind in range(len(PARAMS)):
        assert wanted[kind :: len(PARAMS)] != plain[kind :: len(PARAMS)], (
            "these parameters change nothing and prove nothing"
        )
    for percent, chunk in ((PLACEMENTS[1], 7), (PLACEMENTS[2], 64)):
        with start(folder, tmp_path, percent, prefill_chunk=chunk) as llm:
            assert tokens(llm.generate(PROMPTS, params)) == wanted
            # A job that was cut off after five prompts and goes on with the rest: same company or not.
            assert tokens(llm.generate(PROMPTS[:5], params[:5], first_index=0)) == wanted[:5]
            assert tokens(llm.generate(PROMPTS[5:], params[5:], first_index=5)) == wanted[5:]


@pytest.mark.parametrize("percent", PLACEMENTS[:2])
@torch.no_grad()
def test_logprobs_of_generated_tokens_equal_transformers(percent, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with start(folder, tmp_path, percent) as llm:
        completions = llm.generate(
            PROMPTS, SamplingParams(max_tokens=6, temperature=0.7, logprobs=4, prompt_logprobs=2, ignore_eos=True)
        )
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        wanted = model(torch.tensor([prompt + completion.token_ids])).logits[0].log_softmax(-1)
        rows = [*completion.prompt_logprobs[1:], *completion.logprobs]
        for index, (token, entries) in enumerate(zip((prompt + completion.token_ids)[1:], rows, strict=True)):
            best = wanted[index].topk(4 if index >= len(prompt) - 1 else 2).indices.tolist()
            assert set(entries) == {token, *best}
            assert all(
                entry.logprob == pytest.approx(wanted[index, name].item(), abs=1e-4) for name, entry in entries.items()
            )


def test_one_prompt_and_several_of_every_kind(folder, tmp_path):
    """What is given alone is what is given in a list of one; the model's tokenizer has a template for chats."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    shutil.copytree(folder, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    kinds = [
        "def f():",
        PROMPTS[1],
        np.array(PROMPTS[2]),
        tuple(PROMPTS[4]),
        [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}],
    ]
    params = SamplingParams(max_tokens=4, temperature=0)
    with start(tmp_path / "model", tmp_path, PLACEMENTS[0]) as llm:
        together = tokens(llm.generate(kinds, params))
        assert [tokens(llm.generate(kind, params)) for kind in kinds] == [[found] for found in together]
        assert llm.generate([], params) == [] and tokens(llm.generate(iter(kinds), params)) == together
        assert llm.generate(kinds[-1], params)[0].prompt_token_ids == tokenizer("<system>x<user>y")["input_ids"]


def test_logits_of_a_long_prompt_never_exist_at_once(folder, tmp_path, monkeypatch):
    head, rows = head_of_passes.layers.head, []
    monkeypatch.setattr(head_of_passes.layers, "head", lambda *given: rows.append(len(given[2])) or head(*given))
    (prompt,) = random_prompts([500])
    with start(folder, tmp_path, PLACEMENTS[0], prefill_chunk=512) as llm:
        (completion,) = llm.generate([prompt], SamplingParams(max_tokens=0, prompt_logprobs=1))
        assert llm.report()["passes"] == 1 and completion.token_ids == []
    assert len(completion.prompt_logprobs) == 500 and sum(rows) == 499 and max(rows) == MIN_LOGIT_ROWS


@pytest.mark.parametrize(
    ("source", "dtype"),
    grid([torch.float32, torch.float16, torch.bfloat16], ["float32", "bfloat16", "float16"]),
    ids=str,
)
@torch.no_grad()
def test_any_stored_dtype_runs_in_any_compute_dtype(source, dtype, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=source)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=getattr(torch, dtype)).float()
    tolerance = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.4}[dtype]
    with start(tmp_path / "model", tmp_path, PLACEMENTS[1], dtype=dtype) as llm:
        completions = llm.generate(PROMPTS, SamplingParams(max_tokens=0, prompt_logprobs=0))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        expected = wanted(torch.tensor([prompt])).logits[0].log_softmax(-1)
        for index, token in enumerate(prompt[1:]):
            assert completion.prompt_logprobs[index + 1][token].logprob == pytest.approx(
                expected[index, token].item(), abs=tolerance
            )
