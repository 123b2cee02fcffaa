"""Experts that are copied to a GPU as they are hit: the tokens of whole layers, in every form that experts are stored
in, and the host waits for nothing."""

from __future__ import annotations

import pytest
import torch

from flexbatch import LLM, SamplingParams
from flexbatch.kernels import pages
from flexbatch.memory.weights import WeightStore
from tests.engine.test_hit_experts import NOTHING, always
from tests.tiny_models import make_model, random_prompts

pytestmark = pytest.mark.gpu
PLACEMENTS = {"cpu": (0, 100, 0, 100, 100, 0), "mixed": (30, 40, 40, 30, 50, 20)}
CELLS = [
    # family, tensors, micro-batches, bits, percent of the CPU's experts, overlap
    ("qwen3_moe", "cpu", 1, 16, 0, True),
    ("qwen3_moe", "mixed", 2, 16, 0, True),
    ("qwen3_moe", "cpu", 3, 16, 50, True),
    ("deepseek_v2", "mixed", 2, 16, 0, False),
    ("granitemoe", "cpu", 2, 4, 0, True),
    ("granitemoe", "mixed", 2, 8, 50, True),
    ("llama4_text", "cpu", 2, 16, 50, True),
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, cell)))
def test_tokens_are_those_of_whole_layers(cell, tmp_path, monkeypatch):
    """Passes of all sizes, from slabs that hold nothing when a layer gets them."""
    family, place, micro_batches, bits, share, overlap = cell
    make_model(family, tmp_path / "model")
    options = {
        "percent": PLACEMENTS[place], "num_gpu_batches": micro_batches, "weight_bits": bits, "cpu_experts": share,
        "overlap": overlap, "gpu_batch_size": 3, "prefill_chunk": 20, "gpu_memory": "2GiB", "cpu_memory": "2GiB",
        "device": "cuda", "dtype": "float32", "offload_dir": str(tmp_path / "off"),
    }  # fmt: skip
    leases, lease = [], WeightStore.lease

    def emptied(store: WeightStore, layer: int):
        made = lease(store, layer)
        # On the stream that computes: after all who read the slab, and before the copies wait for them.
        store.slabs[made.slab].fill_(NOTHING)
        store.free_after[made.slab] = store.queues.mark()
        leases.append(made)
        return made

    monkeypatch.setattr(WeightStore, "lease", emptied)
    params, found, crossed = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True), [], []
    for by_hit in (False, True):
        with LLM(str(tmp_path / "model"), **options) as llm:
            hits = llm.weights.hit_experts
            hits.max_tokens = 10**6 if by_hit else 0
            found.append([each.token_ids for each in llm.generate(random_prompts([1, 29, 7, 60], seed=3), params)])
            assert any(each.by_hit and each.arrived is not None for each in leases) is by_hit
            llm.weights.check()
            llm.queues.synchronize()
            crossed.append(llm.queues.h2d.num_bytes + hits.take_bytes())
    assert found[0] == found[1] and crossed[1] < crossed[0]


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_log_probabilities_are_those_of_whole_layers(dtype, micro_batches, tmp_path):
    """Bit for bit, in the dtypes of tensor cores, by turns and again: nothing depends on when experts came."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 64, "num_experts_per_tok": 8}
    make_model("qwen3_moe", tmp_path / "model", **sizes)
    options = {
        "percent": (0, 100, 100, 0, 100, 0), "num_gpu_batches": micro_batches, "gpu_batch_size": 12, "device": "cuda",
        "gpu_memory": "2GiB", "cpu_memory": "2GiB", "dtype": dtype, "offload_dir": str(tmp_path / "off"),
    }  # fmt: skip
    prompts = random_prompts([8] * 9, seed=5)
    params, found = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, logprobs=1), []
    with LLM(str(tmp_path / "model"), **options) as llm:
        for most in (0, 10**6, 0, 10**6, 0, 10**6):
            llm.weights.hit_experts.max_tokens = most
            found.append([(each.token_ids, each.logprobs) for each in llm.generate(prompts, params)])
    assert all(each == found[0] for each in found), [each == found[0] for each in found]


def test_few_tokens_after_many_and_many_after_few(tmp_path, monkeypatch):
    """What was on its way when passes change over is used as it came."""
    always(monkeypatch)
    make_model("qwen3_moe", tmp_path / "model")
    options = {
        "percent": PLACEMENTS["cpu"], "num_gpu_batches": 2, "gpu_batch_size": 8, "gpu_memory": "2GiB",
        "cpu_memory": "2GiB", "device": "cuda", "dtype": "float32", "offload_dir": str(tmp_path / "off"),
    }  # fmt: skip
    params, prompts, found = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True), random_prompts([9] * 12), []
    for limit in (0, 10):
        with LLM(str(tmp_path / "model"), **options) as llm:
            llm.weights.hit_experts.max_tokens = limit
            jobs = (prompts, prompts[3:4], prompts[5:11], prompts[:2], prompts)
            found.append([[each.token_ids for each in llm.generate(job, params)] for job in jobs])
            llm.runner.check()
    assert found[0] == found[1]


@pytest.mark.parametrize("hit", [0, 1, 40, 128])
def test_the_host_waits_for_nothing(hit):
    """And every byte of the wanted parts comes, and no other: 256 parts of 1 MiB."""
    each, experts = 1 << 20, 128
    host = torch.randint(0, 255, (2 * experts * each,), dtype=torch.uint8).pin_memory()
    parts = torch.tensor([(index // 2, index * each, (index + 1) * each) for index in range(2 * experts)]).cuda()
    wanted = torch.zeros(experts, dtype=torch.bool, device="cuda")
    wanted[torch.randperm(experts)[:hit].cuda()] = True
    target = torch.full_like(host, 7, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        pages.copy_parts(host, target, parts, wanted, 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = torch.where(wanted.repeat_interleave(2)[:, None], host.cuda().view(2 * experts, each), 7).view(-1)
    assert torch.equal(target, expected)
