"""Requests, sequences and caches for the tests of the execution room."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flexbatch.execution.batcher import Candidate
from flexbatch.execution.request_state import RequestState
from flexbatch.execution.work import Sequence
from flexbatch.memory.kvcache import CacheSizes, KVCache
from flexbatch.memory.pages import CacheLayout, PageTable
from flexbatch.request import Request, SamplingParams
from flexbatch.text.detokenize import OutputText
from tests.memory.rigs import open_tiers

EOS = 1
PAGE_TOKENS = 4


def candidate(index: int, prompt: tuple[int, ...], max_context: int = 1000, **params: Any) -> Candidate:
    request = Request(index, list(prompt), SamplingParams(**{"max_tokens": 4, "temperature": 0, **params}))
    output = OutputText(None, request.params, eos_token_ids=(EOS,), prompt_token_ids=prompt, max_context=max_context)
    return Candidate(RequestState(request), output)


def sequence(prompt: tuple[int, ...], table: PageTable, output: tuple[int, ...] = (), **params: Any) -> Sequence:
    """A sequence in flight that has generated ``output``."""
    waiting = candidate(0, prompt, **{"max_tokens": len(output) + 4, **params})
    made = Sequence(waiting.state, waiting.output, table, 0, list(prompt))
    for token in output:
        made.output.append(token)
        made.state.append(token)
        made.token_ids.append(token)
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
