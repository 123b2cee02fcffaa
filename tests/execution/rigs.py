"""Requests, sequences and caches for the tests of the execution package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flexbatch.execution.sequence import Sequence
from flexbatch.memory.kvcache import KVCache
from flexbatch.memory.pages import CacheLayout, PageTable
from flexbatch.policy.admission import CacheSizes
from flexbatch.request import Request, SamplingParams
from tests.memory.rigs import open_tiers

EOS = 1
PAGE_TOKENS = 4


def waiting(index: int, prompt: tuple[int, ...], max_context: int = 1000, priority: int = 0, **params: Any) -> Sequence:
    sampling = SamplingParams(**{"max_tokens": 4, "temperature": 0, **params})
    request = Request(index, list(prompt), sampling, priority=priority)
    return Sequence(request, eos_token_ids=(EOS,), max_context=max_context, sequence_id=index)


def sequence(prompt: tuple[int, ...], table: PageTable, output: tuple[int, ...] = (), **params: Any) -> Sequence:
    """A sequence in flight that has generated ``output``."""
    made = waiting(0, prompt, **{"max_tokens": len(output) + 4, **params})
    made.table = table
    made.extend(output)
    made.check()
    return made


@contextmanager
def open_cache(folder: Path, sizes: CacheSizes) -> Iterator[KVCache]:
    layout = CacheLayout(1, 1, 2, 16, 64, PAGE_TOKENS, torch.float32)
    with open_tiers(folder) as (tiers, queues):
        cache = KVCache(layout, sizes, tiers, queues)
        try:
            yield cache
        finally:
            cache.close()
