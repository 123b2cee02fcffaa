"""Pages of sequences that come back are theirs, whatever others have under way."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexbatch.memory.handles import READY
from flexbatch.memory.kvcache import KVCache
from flexbatch.memory.page_moves import park, restore
from flexbatch.memory.pages import Gather
from tests.memory.rigs import open_tiers
from tests.memory.test_kvcache import LAYERS, PAGE_TOKENS, SIZES, layout_of

TOKENS = PAGE_TOKENS - 1


@pytest.mark.parametrize("tier", ["cpu", "disk"])
@pytest.mark.parametrize("late", ["d2h", "disk_write"])
def test_rows_of_one_that_has_ended_do_not_lie_over_those_of_one_that_comes_back(
    tmp_path: Path, tier: str, late: str
) -> None:
    """It gets the page of the other, whose last rows are still on their way there: on a busy machine one run in ten of
    `engine/test_step.py` had a sequence with a wrong token."""
    sizes = replace(SIZES, cpu_pages=1, disk_pages=1, disk_sequences=1)
    with open_tiers(tmp_path) as (tiers, queues):
        cache = KVCache(layout_of(16), sizes, tiers, queues)
        mine, others = torch.randn(2, LAYERS, TOKENS, 2, 2, 6)
        aside = cache.open("gpu", TOKENS)
        for layer in range(LAYERS):
            cache.rows("gpu", layer)[aside.location.slots(0, TOKENS, PAGE_TOKENS)] = mine[layer]
        cache.commit(aside, TOKENS)
        parked = park(cache, aside, "gpu")
        ended = cache.open(tier, TOKENS)
        page = list(ended.pages)
        cache.begin_pass(READY)
        getattr(queues, late).submit(lambda: time.sleep(0.2))
        for layer in range(LAYERS):
            if tier == "cpu":
                slots = torch.tensor(ended.location.slots(0, TOKENS, PAGE_TOKENS))
                cache.drain_cpu(layer, others[layer], slots)
            else:
                cache.drain_disk(layer, others[layer], [(ended.location, 0, TOKENS, 0)], READY)
        cache.commit(ended, TOKENS)
        cache.free(ended)
        table = restore(cache, parked, tier)
        assert table.pages == page
        cache.synchronize()
        cache.begin_pass(READY)
        on_disk = tier == "disk"
        pages = torch.tensor([] if on_disk else page, dtype=torch.int32)
        for layer in range(LAYERS):
            gather = Gather(pages, ((table.location, TOKENS),) if on_disk else (), int(on_disk))
            cache.gather(gather, layer, 0).wait()
            assert torch.equal(cache.staging_rows(0)[:TOKENS], mine[layer]), layer
            cache.release_staging(0, READY)
        cache.free(table)
        cache.close()
