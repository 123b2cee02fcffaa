"""Whole jobs, streams and comparisons: each is a sequence of turns of the engine's loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from collections.abc import Sequence as Many
from itertools import count
from typing import Any

from flexbatch.execution.feed import Feed
from flexbatch.intake import Item
from flexbatch.loop import EngineLoop
from flexbatch.planner.comparison import Turn, turns
from flexbatch.planner.report import Statistics
from flexbatch.request import Completion, Request
from flexbatch.validation.errors import ConfigurationError


def completions(
    loop: EngineLoop, requests: Many[Request], drafted: bool = True
) -> Generator[tuple[Request, Completion], None, None]:
    """The completion of every request of a job, as it ends; the caller delivers it. drafted: with the drafts, where
    there are any. Raises ConfigurationError for one that no block holds."""
    with loop.ending():
        job = loop.job(requests)
        runner = loop.capacity.prepare(job)
        loop.begin(runner, (), loop.capacity.speculator if drafted else None, job)
        loop.intake.add_requests(requests)
        while loop.intake:
            for sequence in loop.advance(complete=True):
                completion = loop.intake.completion_of(sequence)
                if sequence.table is None:
                    raise ConfigurationError(completion.error)
                yield sequence.request, completion
        if loop.draining:
            raise KeyboardInterrupt


def stream(
    loop: EngineLoop,
    items: Iterable[Item],
    on_tokens: Callable[[Hashable, str], None] | None,
    helper: Callable[..., Any],
) -> Generator[tuple[Hashable, Completion], None, None]:
    """Items of `LLM.stream` in, (key, completion) out. ``helper``: what the thread that draws them is made by."""
    loop.intake.check_empty("stream")
    numbers = count()
    with contextlib.closing(Feed(items, helper)) as feed, loop.ending(feed.wake):
        while True:
            if loop.draining and not loop.intake:
                return
            block, peeked = loop.capacity.peeked
            limit = block if loop.running else peeked
            wanted = 0 if loop.draining else limit - loop.intake.num_waiting
            for item in feed.take(wanted, wait=not loop.intake):
                refused = loop.intake.add_item(next(numbers), item, on_tokens)
                if refused is not None:
                    yield refused
            if loop.intake:
                yield from loop.step(complete=feed.ended)
            elif feed.ended:
                return


def compared(loop: EngineLoop, requests: Many[Request]) -> Generator[tuple[Request, Completion], None, None]:
    """`completions`, with plain decoding of the same requests by turns, for the report. No turn finds prompts in
    the cache that an earlier one has read."""
    loop.capacity.prepare(loop.job(requests))
    for turn in turns(requests, loop.planner.engine_plan.block_policy.block_size):
        loop.capacity.prepare(loop.job(turn.requests)).cache.forget_prefixes()
        with measuring(loop, turn):
            for request, completion in completions(loop, turn.requests, turn.drafted):
                if turn.drafted and turn.kept:
                    yield request, completion
                else:
                    loop.intake.deliver(completion, request)


@contextlib.contextmanager
def measuring(loop: EngineLoop, turn: Turn) -> Iterator[None]:
    """Statistics of the body where they belong: those of the job, of the job without speculation, or nowhere; and
    in the comparison."""
    own, kept_baseline = loop.statistics, loop.comparison.kept_baseline
    counted = Statistics() if not turn.kept else own if turn.drafted else kept_baseline
    seconds, tokens, loop.statistics = counted.seconds, counted.generated_tokens, counted
    try:
        yield
        loop.comparison.add(turn, counted.seconds - seconds, counted.generated_tokens - tokens)
    finally:
        loop.statistics = own
