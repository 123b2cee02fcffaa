"""What stands beside the parity grid, on a GPU: passes ahead of the host, adapters and experts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flexbatch import LLM, SamplingParams
from flexbatch.kernels import experts
from tests.engine.test_ahead import KINDS, completed, requests
from tests.engine.test_lora import GREEDY, tokens_of, write_three
from tests.kernels.test_experts import routed, units
from tests.tiny_models import greedy_tokens, make_model, random_prompts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
MEMORY = {"gpu_memory": "2GiB", "cpu_memory": "2GiB", "device": "cuda", "dtype": "float32"}
PLACEMENTS = {
    "gpu": {"percent": (100, 0, 100, 0, 100, 0), "gpu_batch_size": 18, "num_gpu_batches": 1},
    "mixed": {"percent": (50, 30, 30, 40, 50, 20), "gpu_batch_size": 5, "num_gpu_batches": 2, "cpu_attention": 0.5},
}


@pytest.mark.parametrize("weight_bits", [16, 4])
@pytest.mark.parametrize("num_gpu_batches", [1, 2])
def test_passes_ahead_give_the_same_completions(num_gpu_batches, weight_bits, reference, tmp_path):
    job = requests([*KINDS, "greedy", "stop tokens", "penalties"])
    found = []
    for ahead in (False, True):
        place = {"percent": (100, 0, 100, 0, 100, 0), "gpu_batch_size": 7, "num_gpu_batches": num_gpu_batches}
        options = {**MEMORY, **place, "weight_bits": weight_bits, "prefill_budget": 40, "async_scheduling": ahead}
        with LLM(str(reference("llama").folder), offload_dir=str(tmp_path), **options) as llm:
            found.append([completed(llm, job, streamed) for streamed in (False, True)])
            llm.runner.check()
    assert found[0] == found[1]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_adapters(case, placement, tmp_path):
    model = make_model(case, tmp_path / "model")
    folders = write_three(model, tmp_path)
    prompts = random_prompts([1, 29, 7], seed=len(case))
    wanted = {name: tokens_of(model, prompts, folder) for name, folder in {**folders, None: None}.items()}
    order = [(name, i) for i in range(len(prompts)) for name in wanted]
    options = {**MEMORY, **PLACEMENTS[placement]}
    with LLM(str(tmp_path / "model"), lora=folders, offload_dir=str(tmp_path / "off"), **options) as llm:
        found = llm.generate([prompts[i] for _, i in order], GREEDY, lora_request=[name for name, _ in order])
    assert [each.token_ids for each in found] == [wanted[name][i] for name, i in order]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("case", ["qwen3_moe", "glm4_moe", "granitemoe"])
def test_models_with_experts(case, placement, tmp_path):
    model = make_model(case, tmp_path / "model")
    prompts = random_prompts([1, 29, 7, 60], seed=3)
    wanted = [greedy_tokens(model, prompt, 8, eos_token_id=None) for prompt in prompts]
    options = {**MEMORY, **PLACEMENTS[placement]}
    with LLM(str(tmp_path / "model"), offload_dir=str(tmp_path / "off"), **options) as llm:
        found = llm.generate(prompts, dataclasses.replace(GREEDY, max_tokens=8))
    assert [each.token_ids for each in found] == wanted


@pytest.mark.parametrize("tokens", [1, 5, 150, 2000])
@pytest.mark.parametrize("cut", [[7], [3, 4], [1, 2, 1, 3]])
def test_grouped_products_are_those_of_the_loop(cut, tokens):
    x, chosen, shares, gate_up, down = (each.cuda() for each in routed(tokens, 3, dtype=torch.bfloat16))
    parts = units(gate_up, cut, True), units(down, [3, 4], True)
    assert experts.has_grouped_product(x, parts[0]) and experts.has_grouped_product(x, parts[1])
    groups = experts.by_groups(x, chosen, shares, *parts, "silu")
    torch.testing.assert_close(groups, experts.by_loop(x, chosen, shares, *parts, "silu"), atol=0.02, rtol=0.02)
    alone = experts.by_groups(x[:1], chosen[:1], shares[:1], *parts, "silu")
    torch.testing.assert_close(groups[:1], alone, atol=0.02, rtol=0.02)


def test_bf16_experts_wait_for_nothing(tmp_path):
    """By the grouped product: whole passes of a model with experts in bfloat16, and finite log-probabilities."""
    make_model("qwen3_moe", tmp_path / "model", hidden_size=64, moe_intermediate_size=32)
    options = {**MEMORY, **PLACEMENTS["gpu"], "dtype": "bfloat16"}
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=1)
    with LLM(str(tmp_path / "model"), offload_dir=str(tmp_path / "off"), **options) as llm:
        found = llm.generate(random_prompts([1, 29, 7, 60], seed=3), params)
    assert [len(each.token_ids) for each in found] == [12] * 4 and not any(each.error for each in found)
