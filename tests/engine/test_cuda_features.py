"""What stands beside the parity grid, on a GPU: passes ahead of the host, adapters and experts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flexbatch import LLM, SamplingParams
from flexbatch.kernels import experts
from flexbatch.kernels.expert_codes import GatedActivation, stacks_of
from flexbatch.models import layers
from tests.engine.test_ahead import KINDS, completed, requests
from tests.engine.test_lora import GREEDY, tokens_of, write_three
from tests.kernels.test_experts import routed, units
from tests.tiny_models import greedy_tokens, make_model, random_prompts

pytestmark = pytest.mark.gpu
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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_the_kernels_give_the_products_of_the_loop(dtype, cut, tokens):
    x, chosen, shares, gate_up, down = (each.cuda() for each in routed(tokens, 3, dtype=dtype))
    shares = shares.float()
    stacks = [stacks_of(each) for each in (units(gate_up, cut, True), units(down, [3, 4], True))]
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.02}
    wanted = experts.by_loop(x, chosen, shares, *stacks, GatedActivation())
    torch.testing.assert_close(experts.expert_mlp(x, chosen, shares, *stacks, GatedActivation()), wanted, **tolerance)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [16, 4])
def test_experts_wait_for_nothing(bits, dtype, tmp_path):
    """Layers of experts in 16 bits and in codes: no call waits for the GPU, and log-probabilities are finite."""
    make_model("qwen3_moe", tmp_path / "model", hidden_size=64, moe_intermediate_size=64)
    options = {**MEMORY, **PLACEMENTS["gpu"], "dtype": dtype, "weight_bits": bits}
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=1)
    prompts = random_prompts([1, 29, 7, 60], seed=3)
    with LLM(str(tmp_path / "model"), offload_dir=str(tmp_path / "off"), **options) as llm:
        llm.generate(prompts, params)
        way = layers.experts.feed_forward

        def watched(*arguments, **others):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return way(*arguments, **others)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers.experts, "feed_forward", watched)
            found = llm.generate(prompts, params)
    assert [len(each.token_ids) for each in found] == [12] * 4 and not any(each.error for each in found)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("case", ["qwen3_moe", "glm4_moe", "gpt_oss", "deepseek_v2"])
def test_decode_graphs_of_experts(case, bits, reference, tmp_path):
    """The same tokens as pass by pass, and the same counts of the router's choices; sequences end one by one. Passes
    ahead would count the token after one that nobody knew to be the last."""
    model = reference(case)
    params = [SamplingParams(max_tokens=5 + 3 * i, temperature=0) for i in range(len(model.prompts))]
    found, counts = [], []
    for overlap in (True, False):
        options = {**MEMORY, **PLACEMENTS["gpu"], "overlap": overlap, "weight_bits": bits, "async_scheduling": False}
        with LLM(str(model.folder), offload_dir=str(tmp_path), **options) as llm:
            for _ in range(3):
                found.append([each.token_ids for each in llm.generate(model.prompts, params)])
            graphs = llm.runner.executor.graphs
            assert (graphs is not None and len(graphs.captured) > 0) == overlap
            llm.runner.check()
            counts.append(llm._capacity.routing.total.cpu())
    assert all(tokens == found[0] for tokens in found)
    assert torch.equal(*counts)


@pytest.mark.alone
@pytest.mark.parametrize("bits", [16, 4])
def test_graphs_of_experts_take_what_is_planned_for_them(bits, reference, tmp_path):
    """More buckets than are kept, by the driver's own count of what is free."""
    model = reference("qwen3_moe")
    options = {**MEMORY, **PLACEMENTS["gpu"], "gpu_batch_size": 64, "dtype": "bfloat16", "weight_bits": bits}
    with LLM(str(model.folder), offload_dir=str(tmp_path), **options) as llm:
        prompts = [model.prompts[3]] * 64
        params = [SamplingParams(max_tokens=4 + 5 * i, temperature=0, ignore_eos=True) for i in range(64)]
        llm.prepare(prompts, params)
        llm.generate(prompts, [SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)] * 64)
        graphs = llm.runner.executor.graphs
        assert graphs is not None
        graphs.clear()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.mem_get_info()[0]
        for _ in range(3):
            llm.generate(prompts, params)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        (planned,) = [row["num_bytes"] for row in llm.report()["memory"] if row["what"].startswith("decode graphs")]
        taken = before - torch.cuda.mem_get_info()[0]
        assert 0 < len(graphs.captured) <= graphs.most
        assert taken <= planned, f"{len(graphs.captured)} graphs take {taken} bytes, planned are {planned}"
