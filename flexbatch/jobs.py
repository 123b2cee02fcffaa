"""Whole jobs, streams and comparisons: each is a sequence of turns of the engine's loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Many
from dataclasses import asdict
from itertools import count
from typing import Any

from flexbatch.execution.feed import Feed
from flexbatch.execution.garbage import frozen_heap
from flexbatch.intake import Item
from flexbatch.loop import EngineLoop
from flexbatch.planner.comparison import Turn, turns
from flexbatch.planner.forecast import Forecast, kept_pages
from flexbatch.planner.report import Report, Statistics, describe_memory, of_engines
from flexbatch.request import Completion, Request
from flexbatch.validation.errors import ConfigurationError


def completions(
    loop: EngineLoop, requests: Many[Request], drafted: bool = True
) -> Generator[tuple[Request, Completion], None, None]:
    """The completion of every request of a job, as it ends; the caller delivers it. drafted: with the drafts, where
    there are any. Raises ConfigurationError for one that no block holds."""
    with loop.ending(), frozen_heap():
        job = loop.job(requests).of_every(loop.engines)
        with loop.shared(job, exactly=True):
            runner = loop.capacity.prepare(job)
        forecast = Forecast(loop.planner.engine_plan, job, runner.sizes, requests, kept_pages(runner.cache))
        loop.begin(runner, (), loop.capacity.speculator if drafted else None, forecast)
        loop.intake.add_requests(requests)
        while loop.intake:
            for request, completion, refused in turn(loop, complete=True):
                if refused:
                    raise ConfigurationError(completion.error)
                yield request, completion
        if loop.draining:
            raise KeyboardInterrupt


def turn(loop: EngineLoop, complete: bool) -> Iterator[tuple[Request, Completion, bool]]:
    """A pass, and what other engines have finished meanwhile; where nothing runs here, a moment of waiting for them.
    Every completion comes with whether no block holds its request."""
    for sequence in loop.advance(complete):
        yield sequence.request, loop.intake.completion_of(sequence), sequence.table is None
    if loop.others is not None:
        began = time.perf_counter()
        yield from loop.others.finished(wait=not loop.running)
        if not loop.running:
            loop.statistics.seconds += time.perf_counter() - began


def step(loop: EngineLoop, complete: bool) -> list[tuple[Hashable, Completion]]:
    """A turn over what has come in; what was asked for is in the results once its last sample is there."""
    delivered = (loop.intake.deliver(completion, request) for request, completion, _ in turn(loop, complete))
    return [whole for whole in delivered if whole is not None]


@contextlib.contextmanager
def ended_when_empty(loop: EngineLoop) -> Iterator[None]:
    """Ends the run where the body leaves nobody who waits or runs. A drain was of those who were there, and holds for
    nobody who comes later; one that came before anybody was is kept for the next."""
    asked = bool(loop.intake) or loop.scheduler is not None
    try:
        yield
    finally:
        if not loop.intake:
            loop.end_everywhere()
            loop.draining = loop.draining and not asked


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
            limit = (block if loop.running else peeked) * loop.engines
            wanted = 0 if loop.draining else limit - loop.intake.num_waiting
            for item in feed.take(wanted, wait=not loop.intake):
                refused = loop.intake.add_item(next(numbers), item, on_tokens)
                if refused is not None:
                    yield refused
            if loop.intake:
                yield from step(loop, complete=feed.ended)
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


def report(loop: EngineLoop, loaded: Mapping[str, Any]) -> Report:
    """Of all runs, and of the other engines. ``loaded``: how long loading took, and what was read."""
    found, capacity = loop.planner.engine_plan, loop.capacity
    own = Report(
        **found.describe(),
        **describe_memory(found, capacity.runner, capacity.tiers, capacity.speculator),
        **loaded,
        resources={name: asdict(use) for name, use in loop.tracer.summary().items()},
        **describe(loop),
    )
    return own if loop.others is None else of_engines(own, loop.others.reports())


def describe(loop: EngineLoop) -> dict[str, Any]:
    """What all runs measured, the last job, plan and run beside each other, and what drafts were worth."""
    report: dict[str, Any] = {**loop.statistics.describe(), "answer_lengths": loop.lengths.report()}
    if loop.job_record is not None:
        report["job"] = loop.job_record.describe(loop.planner.machine.known)
    if loop.prediction:
        replans = {"replans": list(loop.replans), "num_replans": len(loop.replans)}
        report["prediction"] = {**loop.prediction, **replans}
    if loop.capacity.routing is not None:
        report["experts"] = loop.capacity.routing.describe()
    if loop.capacity.speculator is not None:
        report["speculation"] = {**loop.capacity.speculator.report(), **loop.comparison.describe()}
    return report
