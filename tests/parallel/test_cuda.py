"""On two GPUs, with NCCL: passes that are recorded with the sums between ranks, and a rank that ends then."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from flexbatch import LLM, SamplingParams
from flexbatch.parallel.processes import PACKAGE_ROOT
from flexbatch.policy import piece_graphs
from flexbatch.policy.decode_graphs import RECORDING_PASSES
from tests.parallel.test_lost_rank import SECONDS
from tests.tiny_models import random_prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
PROMPTS = random_prompts([5, 9, 33, 70, 17, 40, 12], seed=1)
PARAMS = [SamplingParams(max_tokens=9 + 7 * i, temperature=0, ignore_eos=True) for i in range(len(PROMPTS))]


def resident(ranks: int, device: str = "cuda") -> LLM:
    return LLM(
        "demo",
        device=device,
        dtype="float32",
        hardware="h100" if device == "cuda" else "cpu",
        percent=(100, 0, 100, 0, 100, 0),
        num_gpu_batches=1,
        gpu_batch_size=len(PROMPTS),
        gpu_memory="4GiB",
        cpu_memory="2GiB",
        tensor_parallel_size=ranks,
    )


def token_ids(llm: LLM) -> list[list[int]]:
    return [answer.token_ids for answer in llm.generate(PROMPTS, PARAMS)]


def lose_a_rank(device: str = "cuda") -> None:
    """In a process of its own: rank 1 is killed between two passes or in one, and this goes on."""
    with resident(2, device) as llm:
        for _ in range(3):
            token_ids(llm)
        assert llm._capacity.leader is not None and llm._capacity.leader.processes is not None
        llm._capacity.leader.processes.processes[0].kill()
        sys.stderr.write(f"killed at {time.time()}\n")
        while True:
            token_ids(llm)


def test_recorded_passes_of_ranks_have_the_tokens_of_one(monkeypatch):
    """Pieces too, which rank 0 has the others make."""
    monkeypatch.setattr(piece_graphs, "PIECED_RANKS", 2)
    with resident(1) as llm:
        wanted = token_ids(llm)
    with resident(2) as llm:
        assert [token_ids(llm) for _ in range(RECORDING_PASSES + 2)] == [wanted] * (RECORDING_PASSES + 2)
        assert llm.runner is not None
        graphs, pieces = llm.runner.executor.graphs, llm.runner.executor.pieces
        assert graphs is not None and len(graphs.captured) > 2
        assert pieces is not None and pieces.passes >= 2, "those with prompts, in the last jobs"


def test_a_rank_that_is_lost_while_passes_are_replayed():
    """The GPU that is left waits in a recorded sum, and graphs keep the group from being given up."""
    code = "from tests.parallel.test_cuda import lose_a_rank; lose_a_rank()"
    run = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE_ROOT, stderr=-1, text=True, timeout=SECONDS + 30)
    ended, killed = time.time(), float(run.stderr.partition("killed at ")[2].split()[0])
    assert run.returncode and "rank 1 was killed by SIGKILL" in run.stderr, run.stderr
    assert ended - killed < SECONDS, run.stderr
