"""Loading to a GPU by way of pinned memory, with files of the next start written beside the job: what it computes, and
what it leaves, is what a load does that waits for everything."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flexbatch import LLM, SamplingParams
from flexbatch.memory import loading
from flexbatch.memory.file_writer import FILE_WRITERS
from flexbatch.planner.loader import writes_beside_job
from flexbatch.policy.policy import Split
from tests.tiny_models import make_model, random_prompts

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
PROMPTS = random_prompts([3, 20, 41], seed=9)


def started(model: Path, offload: Path, bits: int) -> tuple[list[list[int]], int]:
    """Tokens of two jobs, the first of which runs while files are written, and the bytes that were reused."""
    settings = {"gpu_memory": "2GiB", "cpu_memory": "4GiB", "percent": (100, 0, 100, 0, 100, 0)}
    with LLM(str(model), dtype="float32", weight_bits=bits, offload_dir=str(offload), **settings) as llm:
        answers = [llm.generate(PROMPTS, GREEDY) for _ in range(2)]
        reused = llm.report()["reused_bytes"]
    return [completion.token_ids for answer in answers for completion in answer], reused


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
def test_every_way_of_loading_gives_the_same_tokens_and_files(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices of more than a megabyte, so that they go through pinned memory."""
    sizes = {"hidden_size": 512, "intermediate_size": 1500, "num_attention_heads": 8, "head_dim": 64}
    make_model("llama", tmp_path / "model", num_hidden_layers=3, **sizes)
    found = []
    for staged, beside in itertools.product((False, True), repeat=2):
        monkeypatch.setattr(loading, "STAGED", staged)
        monkeypatch.setattr(loading, "BESIDE_JOB", beside)
        offload = tmp_path / f"{staged}-{beside}"
        first, nothing = started(tmp_path / "model", offload, bits)
        again, reused = started(tmp_path / "model", offload, bits)
        assert nothing == 0 < reused and first == again
        files = {path.relative_to(offload): path.read_bytes() for path in offload.rglob("*.bin")}
        found.append((first, reused, files))
    assert all(each == found[0] for each in found)


def test_files_are_written_beside_a_job_where_it_lies_on_a_gpu_and_buffers_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def decided(device: str = "cuda", cache: float = 1.0, beside: bool = True, used_bytes: int = 0) -> bool:
        monkeypatch.setattr(loading, "BESIDE_JOB", beside)
        whole = Split(1, 0)
        policy = SimpleNamespace(weights=whole, cache=Split(cache, 1 - cache), activations=whole)
        tensors = [
            SimpleNamespace(num_bytes=4096 * 1000, quantized=True),
            SimpleNamespace(num_bytes=1 << 40, quantized=False),
        ]
        plan = SimpleNamespace(policy=policy, weight_plan=SimpleNamespace(all_tensors=tensors))
        budget = FILE_WRITERS * 4096 * 1000 + loading.FILE_BYTES
        host = SimpleNamespace(budget_bytes=budget, total_used_bytes=used_bytes)
        store = SimpleNamespace(tiers=SimpleNamespace(cpu=host), device=torch.device(device))
        return writes_beside_job(plan, store)  # type: ignore[arg-type]

    assert decided()
    assert not decided(device="cpu") and not decided(cache=0.9) and not decided(beside=False)
    assert not decided(used_bytes=1)
