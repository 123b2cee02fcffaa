"""Answers are not as long as assumed, and the cache is quantized: a block runs empty before another one begins."""

from __future__ import annotations

from typing import Any

import pytest

from flexbatch import LLM
from flexbatch.loop import EngineLoop
from tests.engine.test_stepping_aside import SETTINGS, replanned, requests, told

__all__ = ["replanned"]


@pytest.mark.parametrize(
    "place",
    [
        pytest.param({"percent": (100, 0, 100, 0, 100, 0), "cache_bits": 4}, id="gpu, 4 bits"),
        pytest.param(
            {"percent": (50, 30, 0, 100, 100, 0), "cache_bits": 8, "cpu_attention": 0.5},
            id="cpu, 8 bits",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"percent": (100, 0, 30, 30, 100, 0), "cache_bits": 4}, id="all tiers, 4 bits", marks=pytest.mark.slow
        ),
    ],
)
def test_a_quantized_block_runs_empty_before_another_one_begins(reference, tmp_path, replanned, monkeypatch, place):
    """Codes that are computed anew differ now and then: nobody is read anew for another block, and nobody is lost."""
    blocks: list[int] = []
    begin = EngineLoop.begin

    def began(loop: EngineLoop, *arguments: Any, **more: Any) -> None:
        assert not loop.running
        begin(loop, *arguments, **more)
        blocks.append(loop.planner.engine_plan.policy.gpu_batch_size)

    folder, (prompts, params) = str(reference("llama").folder), requests()
    prompts, params = prompts * 2, params * 2
    roomy = {**SETTINGS, **place, "gpu_memory": "1GiB", "cpu_memory": "1GiB", "offload_dir": str(tmp_path)}
    roomy |= {"gpu_batch_size": 2, "num_gpu_batches": 1}
    with LLM(folder, **roomy, reserve="all") as llm:
        wanted = told(llm.generate(prompts, params))
    monkeypatch.setattr(EngineLoop, "begin", began)
    with LLM(folder, **roomy) as llm:
        assert told(llm.generate(prompts, params)) == wanted
        assert len(set(blocks)) >= 3 and not llm.report()["preemptions"]["recomputed_tokens"]
        assert len(llm._loop.replans) == len(replanned) >= len(blocks) - 1, "a block that has room grows as it is"
        del blocks[:]
        found = dict(llm.stream((i, *item) for i, item in enumerate(zip(prompts, params, strict=True))))
        assert told(found[i] for i in range(len(prompts))) == wanted and len(set(blocks)) >= 2
        llm.tiers.check()
        llm.runner.cache.check([])
