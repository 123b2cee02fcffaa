"""A sequence steps aside, where it is, in the middle of a prompt whose beginning others have come to share: nobody
fills those pages while it does not run."""

from __future__ import annotations

from typing import Any

import pytest

from flexbatch import LLM, SamplingParams
from tests.tiny_models import random_prompts

SETTINGS: dict[str, Any] = {
    "gpu_batch_size": 1, "num_gpu_batches": 1, "prefill_chunk": 16, "gpu_memory": "1GiB", "cpu_memory": "1GiB",
    "device": "cpu", "dtype": "float32", "hardware": "cpu",
}  # fmt: skip
PLACES = {"gpu": (100, 0, 100, 0, 100, 0), "cpu": (100, 0, 0, 100, 100, 0), "disk": (100, 0, 0, 0, 100, 0)}
ANSWER = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


@pytest.mark.parametrize("place", PLACES)
def test_a_more_urgent_one_takes_the_slot_of_one_whose_beginning_it_shares(place, reference, tmp_path):
    """It had that slot, and waited for pages that the other could not go on to fill: the pass was empty, and an
    IndexError ended all requests. Three of a kind: the last comes while the first is aside."""
    folder = reference("llama").folder
    head, *others = random_prompts([70, 200, 200, 3, 4, 5], seed=3)
    prompts = [head + end for end in others[2:]]
    with LLM(str(folder), **SETTINGS, percent=PLACES[place], offload_dir=str(tmp_path)) as llm:
        wanted = [llm.generate([prompt], ANSWER)[0].token_ids for prompt in prompts]
        llm.generate(others[:2], ANSWER)  # a pool that holds the pages of all
        assert llm.runner is not None
        for pool in llm.runner.cache.pools.values():
            pool.evict_all()
        found: dict[Any, Any] = {}
        keys = [llm.add_request(prompts[0], ANSWER, priority=1)]
        found |= dict(llm.step()) | dict(llm.step())
        for prompt in prompts[1:]:
            keys.append(llm.add_request(prompt, ANSWER))
            found |= dict(llm.step())
            scheduler = llm._loop.scheduler
            assert scheduler is not None
            scheduler.check()
            assert llm.report()["preemptions"]["kept"] or scheduler.aside.counts.kept
        while llm.has_unfinished():
            found |= dict(llm.step())
            if llm._loop.scheduler is not None:
                llm._loop.scheduler.check()
        assert [found[key].token_ids for key in keys] == wanted
