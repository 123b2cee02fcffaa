"""Work on the next of many items while the one at hand is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def ahead(work: Callable[[T], R], items: Iterable[T], count: int) -> Iterator[tuple[T, R]]:
    """Every item in its order with what ``work`` makes of it, in one of ``count`` threads: so many items are taken from
    ``items``, in the caller's thread, before the first is handed out. 0: one by one, without a thread."""
    if not count:
        yield from ((item, work(item)) for item in items)
        return
    inference = torch.is_inference_mode_enabled()

    def run(item: T) -> R:
        with torch.inference_mode(inference):  # a setting of the thread
            return work(item)

    waiting: deque[tuple[T, Future[R]]] = deque()
    pool = ThreadPoolExecutor(count, thread_name_prefix="flexbatch-decode")
    try:
        for item in items:
            waiting.append((item, pool.submit(run, item)))
            if len(waiting) > count:
                first, future = waiting.popleft()
                yield first, future.result()
                del first, future
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
