"""Pages of the tick after the next are on the link before the host waits for the CPU's attention."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbatch import LLM, SamplingParams
from flexbatch.execution.executor import Executor
from flexbatch.execution.tick_halves import TickHalves
from flexbatch.memory.cache_storage import CacheStorage
from flexbatch.policy.schedule import after_next, zigzag
from tests.tiny_models import make_model, random_prompts


@given(num_layers=st.integers(1, 5), count=st.integers(1, 4))
def test_the_cell_after_the_next_is_two_ticks_later(num_layers: int, count: int) -> None:
    ticks = list(zigzag(num_layers, count))
    cells = [(tick.layer, tick.micro_batch) for tick in ticks]
    assert [after_next(tick, count) for tick in ticks][: max(0, len(cells) - 2)] == cells[2:]
    assert all(after_next(tick, count)[0] >= num_layers for tick in ticks[-2:])


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_link_has_pages_to_bring_while_the_host_waits(
    micro_batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("llama", tmp_path)
    gather, finish, begin = CacheStorage.gather, TickHalves.finish, Executor.begin_pass
    gathered: list[int] = []
    leads = Counter[tuple[int, int]]()

    def begun(self: Executor, *arguments: Any) -> Any:
        gathered.clear()
        return begin(self, *arguments)

    def gathering(self: CacheStorage, work: Any, layer: int, buffer: int) -> Any:
        gathered.append(layer)
        return gather(self, work, layer, buffer)

    def finished(self: TickHalves, pending: Any, count: int) -> bool:
        tick, inputs = pending.tick, pending.inputs
        if pending.cpu_output is not None and inputs.staged is not None and count == micro_batches:
            index, cells = tick.layer * count + tick.micro_batch, self.arch.num_layers * count
            # Of three micro-batches that decode, two more ticks are begun before one is finished.
            leads[len(gathered) - index, min(3 if count == 1 else 5, cells - index)] += 1
        return finish(self, pending, count)

    monkeypatch.setattr(Executor, "begin_pass", begun)
    monkeypatch.setattr(CacheStorage, "gather", gathering)
    monkeypatch.setattr(TickHalves, "finish", finished)
    settings = {"gpu_batch_size": 2, "num_gpu_batches": micro_batches, "prefill_chunk": 64, "cpu_attention": 0.5}
    with LLM(str(tmp_path), device="cpu", hardware="cpu", percent=(100, 0, 0, 100, 100, 0), **settings) as llm:
        prompts = random_prompts([5, 9, 20, 17, 33, 2][: 2 * micro_batches])
        llm.generate(prompts, SamplingParams(max_tokens=9, temperature=0, ignore_eos=True))
    assert leads and all(lead == wanted for lead, wanted in leads), leads
