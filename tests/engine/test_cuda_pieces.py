"""Passes in pieces on a GPU: the tokens of passes that are launched kernel by kernel, whatever comes and goes between
them, and no more memory than is planned."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from flexbatch import LLM, SamplingParams
from flexbatch.execution.piece_graphs import PieceGraphs
from tests.engine.test_lora import write_three
from tests.engine.test_stepping_aside import forced, requests, told
from tests.tiny_models import make_model, random_prompts

__all__ = ["forced"]  # a fixture
pytestmark = pytest.mark.gpu
SETTINGS: dict[str, Any] = {
    "gpu_memory": "2GiB", "cpu_memory": "2GiB", "device": "cuda", "dtype": "float32",
    "percent": (100, 0, 100, 0, 100, 0), "gpu_batch_size": 5, "num_gpu_batches": 1,
}  # fmt: skip
LENGTHS = [5, 9, 3, 30, 17, 8, 40, 2, 11, 6, 21, 4, 13, 70, 1, 33]
CASES = {
    "llama": {"prefill_chunk": 7},
    "opt": {},
    "qwen3": {"prefill_chunk": 16, "async_scheduling": False},
    "gemma2": {"prefill_chunk": 16},
    "qwen3_moe": {},
    "deepseek_v2": {"prefill_chunk": 16},
}
BITS = [(8, 16), (4, 4)]


@pytest.fixture(autouse=True)
def recorded_when_they_come_again(monkeypatch):
    monkeypatch.setattr(PieceGraphs, "recording_passes", 2)


def params_of(count: int, **more: Any) -> list[SamplingParams]:
    kinds = [{"temperature": 0}, {"temperature": 1.0, "seed": 3, "logprobs": 2}, {"temperature": 0.8, "top_p": 0.9}]
    return [
        SamplingParams(**{"max_tokens": 3 + 4 * (i % 6), "ignore_eos": i % 4 > 0, **kinds[i % 3], **more})
        for i in range(count)
    ]


def run(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    """Two jobs, so that buckets come again and are recorded."""
    found = [[each.token_ids for each in llm.generate(prompts, params, first_index=0)] for _ in range(2)]
    assert llm.runner is not None
    llm.runner.check()
    assert found[0] == found[1]
    return found[0]


def pieces_of(llm: LLM) -> Any:
    assert llm.runner is not None
    return llm.runner.executor.pieces


def both_ways(folder: Any, tmp_path: Any, prompts: Any, params: Any, **more: Any) -> list[Any]:
    found = []
    for tokens in (2048, 0):
        options = {**SETTINGS, "offload_dir": str(tmp_path / "off"), "piece_tokens": tokens, **more}
        with LLM(str(folder), **options) as llm:
            found.append(run(llm, prompts, params))
            assert (pieces_of(llm).passes > 5) == bool(tokens)
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_same_tokens(case, reference, tmp_path):
    prompts = random_prompts(LENGTHS, seed=1)
    shared = [prompts[13] + prompt for prompt in prompts[:6]]
    params = params_of(len(prompts + shared))
    one, other = both_ways(reference(case).folder, tmp_path, prompts + shared, params, **CASES[case])
    assert one == other


@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("case", ["llama", "qwen3_moe"])
def test_the_same_tokens_in_few_bits(case, bits, reference, tmp_path):
    prompts = random_prompts(LENGTHS, seed=2)
    more = {"weight_bits": bits[0], "cache_bits": bits[1]}
    one, other = both_ways(reference(case).folder, tmp_path, prompts, params_of(len(prompts)), **more)
    assert one == other


def test_token_trees(reference, tmp_path):
    prompts = random_prompts(LENGTHS, seed=3)
    params = params_of(len(prompts), temperature=0)
    one, other = both_ways(reference("llama").folder, tmp_path, prompts, params, draft=("ngram",), tree="chain:3")
    assert one == other


@pytest.mark.parametrize("case", ["llama", "opt", "gemma2", "qwen3_moe"])
def test_bfloat16(case, reference, tmp_path):
    """Products of as many rows as a bucket has are rounded differently: the first tokens are as likely."""
    prompts = random_prompts(LENGTHS, seed=4)
    params = params_of(len(prompts), temperature=0, logprobs=1)
    firsts = []
    for tokens in (2048, 0):
        options = {**SETTINGS, "offload_dir": str(tmp_path), "piece_tokens": tokens, "dtype": "bfloat16"}
        with LLM(str(reference(case).folder), **options) as llm:
            for _ in range(2):
                done = llm.generate(prompts, params)
            firsts.append([max(each.logprob for each in completion.logprobs[0].values()) for completion in done])
            assert (pieces_of(llm).passes > 5) == bool(tokens)
    assert firsts[0] == pytest.approx(firsts[1], abs=0.03)


def test_with_sequences_that_step_aside(reference, tmp_path, forced):
    """And samples, prefixes, log-probabilities of prompts, stop strings."""
    prompts, params = requests()
    found = []
    for tokens in (2048, 0):
        options = {**SETTINGS, "prefill_chunk": 16, "prefill_budget": 24, "piece_tokens": tokens}
        with LLM(str(reference("llama").folder), offload_dir=str(tmp_path), **options) as llm:
            found += [told(llm.generate(prompts, params, first_index=0)) for _ in range(2)]
            assert (pieces_of(llm).passes > 5) == bool(tokens)
            llm.runner.check()
    assert forced and all(each == found[0] for each in found)


def test_adapters(tmp_path):
    """Passes with adapters, without, and of both."""
    model = make_model("llama", tmp_path / "model")
    folders, prompts = write_three(model, tmp_path), random_prompts(LENGTHS, seed=5)
    names = [[*folders, None][i % 4] if 4 <= i < 10 else None for i in range(len(prompts))]
    found = []
    for tokens in (2048, 0):
        options = {**SETTINGS, "offload_dir": str(tmp_path / "off"), "piece_tokens": tokens, "gpu_batch_size": 2}
        with LLM(str(tmp_path / "model"), lora=folders, **options) as llm:
            for _ in range(2):
                done = llm.generate(prompts, params_of(len(prompts), temperature=0), lora_request=names)
                found.append([each.token_ids for each in done])
            assert (pieces_of(llm).passes > 3) == bool(tokens)
    assert all(each == found[0] for each in found)


def test_engines_that_come_and_go(reference, tmp_path):
    """Two at a time, that run by turns; garbage is collected at every chance, with what a driver has in it."""
    prompts, params = random_prompts(LENGTHS, seed=6), params_of(len(LENGTHS), temperature=0)
    options = {**SETTINGS, "gpu_memory": "1GiB", "piece_tokens": 2048}
    before, found = gc.get_threshold(), []
    gc.set_threshold(50, 2, 2)
    try:
        for turn in range(6):
            engines = [
                LLM(str(reference(case).folder), offload_dir=str(tmp_path / case), **options)
                for case in ("llama", "opt")
            ]
            for _ in range(3):
                garbage: list[Any] = [torch.empty(1000, pin_memory=True), torch.cuda.Event(), torch.cuda.CUDAGraph()]
                garbage[1].record()
                garbage.append(garbage)
                del garbage
                found.append([[each.token_ids for each in llm.generate(prompts, params)] for llm in engines])
            assert all(pieces_of(llm).passes > 5 for llm in engines)
            for llm in engines[:: 1 - 2 * (turn % 2)]:
                llm.close()
    finally:
        gc.set_threshold(*before)
    assert all(each == found[0] for each in found)


@pytest.mark.alone
@pytest.mark.parametrize("case", ["llama", "qwen3_moe"])
def test_pieces_take_what_is_planned_for_them(case, reference, tmp_path):
    """By the driver's own count of what is free; with decode graphs beside them."""
    options = {**SETTINGS, "gpu_batch_size": 64, "dtype": "bfloat16", "piece_tokens": 4096, "prefill_budget": 1024}
    prompts = random_prompts([5 + (37 * i) % 150 for i in range(200)], seed=7)
    params = [SamplingParams(max_tokens=4 + (11 * i) % 40, temperature=0, ignore_eos=True) for i in range(200)]
    with LLM(str(reference(case).folder), offload_dir=str(tmp_path), **options) as llm:
        llm.prepare(prompts, params)
        llm.generate(prompts, [SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)] * 200)
        executor = llm.runner.executor
        executor.clear_graphs()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.mem_get_info()[0]
        for _ in range(3):
            llm.generate(prompts, params)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        (row,) = [row for row in llm.report()["memory"] if row["what"].startswith("decode graphs")]
        taken = before - torch.cuda.mem_get_info()[0]
        assert executor.pieces.captured
        assert taken <= row["num_bytes"], f"{row['what']}: {len(executor.pieces.captured)} buckets take {taken} bytes"


@pytest.mark.parametrize("cache_bits", [16, 8, 4])
@pytest.mark.parametrize("case", ["llama", "gemma2", "opt"])
def test_many_that_decode_are_attended_apart_from_prompts(case, cache_bits, reference, tmp_path, monkeypatch):
    """In float32 their tokens are those of one launch for all."""
    prompts = random_prompts([5 + (37 * i) % 90 for i in range(120)], seed=8)
    params = [SamplingParams(max_tokens=4 + (11 * i) % 30, temperature=0, ignore_eos=True) for i in range(120)]
    found = []
    for least in (1, 1 << 20):
        monkeypatch.setattr("flexbatch.execution.inputs.DECODING_APART", least)
        options = {**SETTINGS, "gpu_batch_size": 48, "cache_bits": cache_bits, "prefill_budget": 128}
        with LLM(str(reference(case).folder), offload_dir=str(tmp_path), **options) as llm:
            found.append([each.token_ids for each in llm.generate(prompts, params)])
    assert found[0] == found[1]
