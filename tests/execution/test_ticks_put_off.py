"""With three micro-batches that decode, the CPU has the queries of two more ticks while it attends, and tokens are the
same, also when links are late."""

from __future__ import annotations

from typing import Any

import pytest

from flexbatch import LLM, SamplingParams
from flexbatch.execution.executor import Executor
from flexbatch.execution.tick_halves import TickHalves
from tests.grids import sampled
from tests.memory.rigs import dawdle
from tests.tiny_models import NEW_TOKENS

GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0)
CELLS = [
    (family, micro_batches, attended, weights)
    for family in ("llama", "gpt_oss", "qwen3_moe")
    for micro_batches in (3, 4)
    for attended in (0.5, 1.0)
    for weights in ("cpu", "mixed", "gpu")
]
PERCENT = {"cpu": (0, 100, 0, 100), "mixed": (30, 40, 20, 50), "gpu": (100, 0, 0, 100)}


@pytest.mark.parametrize(("family", "micro_batches", "attended", "weights"), sampled(CELLS))
def test_tokens_are_those_of_transformers(
    family: str, micro_batches: int, attended: float, weights: str, reference: Any, tmp_path: Any, monkeypatch: Any
) -> None:
    expected, most = reference(family), list[int]()
    begin = TickHalves.most_deferred

    def noted(self: TickHalves, inputs: Any) -> int:
        most.append(begin(self, inputs))
        return most[-1]

    monkeypatch.setattr(TickHalves, "most_deferred", noted)
    sizes = {"gpu_batch_size": 2, "num_gpu_batches": micro_batches, "prefill_chunk": 256, "cpu_attention": attended}
    memory = {"gpu_memory": "1GiB", "cpu_memory": "1GiB", "offload_dir": str(tmp_path)}
    with LLM(str(expected.folder), device="cpu", percent=(*PERCENT[weights], 100, 0), **sizes, **memory) as llm:
        dawdle(llm.queues, seed=micro_batches)
        found = [each.token_ids for each in llm.generate(expected.prompts, GREEDY)]
        assert llm.runner is not None
        llm.runner.check()
        llm.weights.check()
    assert found == expected.token_ids
    assert set(most) == {1, 2}, "with prompts one is put off, without two"


def test_two_ticks_are_begun_before_the_first_is_finished(reference: Any, monkeypatch: Any) -> None:
    """And with prompts in the pass one, whose second half needs the room of no third."""
    expected, begun, between = reference("llama"), 0, set[tuple[bool, int]]()
    start, begin, finish = Executor.begin_pass, TickHalves.begin, TickHalves.finish

    def started(self: Executor, *arguments: Any) -> Any:
        nonlocal begun
        begun = 0
        return start(self, *arguments)

    def counted(self: TickHalves, *arguments: Any) -> Any:
        nonlocal begun
        begun += 1
        return begin(self, *arguments)

    def finished(self: TickHalves, pending: Any, count: int) -> bool:
        index = pending.tick.layer * count + pending.tick.micro_batch
        if pending.cpu_output is not None and count == 3 and index + 3 < self.arch.num_layers * count:
            between.add((pending.inputs.decodes, begun - index - 1))
        return finish(self, pending, count)

    monkeypatch.setattr(Executor, "begin_pass", started)
    monkeypatch.setattr(TickHalves, "begin", counted)
    monkeypatch.setattr(TickHalves, "finish", finished)
    sizes = {"gpu_batch_size": 2, "num_gpu_batches": 3, "prefill_chunk": 256, "cpu_attention": 1.0}
    with LLM(str(expected.folder), device="cpu", hardware="cpu", percent=(0, 100, 0, 100, 100, 0), **sizes) as llm:
        llm.generate(expected.prompts, GREEDY)
    assert (True, 2) in between and (True, 1) not in between, between
