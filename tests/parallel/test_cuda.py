"""On two GPUs, with NCCL: decode passes that are recorded with the sums between ranks, and a rank that ends then."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from flexbatch import LLM, SamplingParams
from flexbatch.policy import decode_graphs
from flexbatch.validation.errors import LostRankError
from tests.parallel.test_lost_rank import SECONDS
from tests.tiny_models import random_prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
PROMPTS = random_prompts([5, 9, 33, 70, 17, 40, 12], seed=1)
PARAMS = [SamplingParams(max_tokens=9 + 7 * i, temperature=0, ignore_eos=True) for i in range(len(PROMPTS))]


def resident(ranks: int) -> LLM:
    return LLM(
        "demo",
        device="cuda",
        dtype="float32",
        hardware="h100",
        percent=(100, 0, 100, 0, 100, 0),
        num_gpu_batches=1,
        gpu_batch_size=len(PROMPTS),
        gpu_memory="4GiB",
        cpu_memory="2GiB",
        tensor_parallel_size=ranks,
    )


def token_ids(llm: LLM) -> list[list[int]]:
    return [answer.token_ids for answer in llm.generate(PROMPTS, PARAMS)]


def test_recorded_passes_of_ranks(monkeypatch):
    """The tokens of one GPU, job after job; and where a rank is killed while passes are replayed, an error within 30 s:
    the GPU that is left waits in a recorded sum."""
    with resident(1) as llm:
        wanted = token_ids(llm)
    monkeypatch.setattr(decode_graphs, "RECORDED_RANKS", 2)
    with resident(2) as llm:
        assert [token_ids(llm) for _ in range(3)] == [wanted] * 3
        graphs = llm.runner.executor.graphs
        assert graphs is not None and len(graphs.captured) > 2
        began, processes = time.monotonic(), llm._capacity.leader.processes
        threading.Timer(0.5, processes.processes[0].kill).start()
        with pytest.raises(LostRankError, match="rank 1 was killed"):
            while time.monotonic() - began < SECONDS:
                token_ids(llm)
    assert 0.5 < time.monotonic() - began < SECONDS
