"""Rank 0 of several engines that share one line of requests: starts the others, hands out, and has what they finish."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from flexbatch.execution.job import Job
from flexbatch.execution.observer import RunObserver
from flexbatch.execution.shared_line import SharedLine
from flexbatch.execution.waiting import WaitingLine
from flexbatch.execution.watch import PassSeen, Watch
from flexbatch.parallel.links import Link
from flexbatch.parallel.processes import GRACE, RankProcesses
from flexbatch.planner import engine_messages as messages
from flexbatch.planner.capacity import Capacity
from flexbatch.request import Completion, Request
from flexbatch.validation.errors import CRASH, ConfigurationError, LostRankError

logger = logging.getLogger("flexbatch")

POLL_SECONDS = 0.05
"""Between two looks at what has come in, where rank 0 has nothing to run itself."""


class OtherEngines:
    """The engines 1 and up, each served by a thread. ``line``: what all of them take from."""

    def __init__(self, links: Mapping[int, Link], processes: RankProcesses | None, threads: int) -> None:
        """threads: of this process, before it shared its cores."""
        self.links, self.processes, self.threads = dict(links), processes, threads
        self.line = SharedLine(1 + len(links))
        self.line.on_waiting = self._wake
        self.watchers: list[RunObserver] = []
        """Those of rank 0's runs. The ones that need not look at a scheduler are told of other engines, too."""
        self.run, self.running, self.handing, self.closing = 0, False, False, False
        self._dry: set[int] = set()
        """Engines that were told that nobody waits."""
        self._ended: queue.SimpleQueue[tuple[Request, messages.Ended]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lost: LostRankError | None = None
        self._told = threading.Event()
        """Whether whoever uses the engine knows that another one has ended."""
        for engine, link in self.links.items():
            threading.Thread(target=self._serve, args=(engine, link), name=f"engine {engine}", daemon=True).start()

    @property
    def count(self) -> int:
        """Engines, rank 0's own among them."""
        return 1 + len(self.links)

    # In the threads that serve

    def _serve(self, engine: int, link: Link) -> None:
        try:
            while True:
                self._take(engine, link, link.receive())
        except LostRankError as error:
            self._end(error)

    def _take(self, engine: int, link: Link, message: Any) -> None:
        if isinstance(message, messages.Want):
            with self.line.lock:
                current = self.running and self.handing and message.run == self.run
                found = self.line.share(engine, message.free, message.slots) if current else []
                if not found:
                    self._dry.add(engine)
                link.send(messages.Share(message.run, found))
        elif isinstance(message, messages.Finished):
            with self.line.lock:
                for ended in message.ended if message.run == self.run else ():
                    if (request := self.line.finished(ended.index, ended.sample)) is not None:
                        self._ended.put((request, ended))
                self._dry.discard(engine)  # it asks again by itself
        elif isinstance(message, messages.Returned):
            with self.line.lock:
                if message.run == self.run:
                    self.line.returned(message.requests)
        elif isinstance(message, messages.SeenElsewhere):
            what = message.what
            seen = dataclasses.replace(what, engine=engine) if isinstance(what, PassSeen) else what
            for watcher in self.watchers:
                if isinstance(watcher, Watch):
                    watcher.told(seen)
        elif isinstance(message, messages.Failed):
            raise LostRankError(f"engine {engine} failed: {message.error}")
        else:
            self._answers.put(message)

    def _end(self, error: LostRankError) -> None:
        """An engine has gone. Whoever waits for it is told; a rank 0 that waits for something else is ended."""
        if self.closing or self._lost is not None:
            return
        self._lost = error
        self._answers.put(error)
        if self.processes is None and not self._told.wait(GRACE) and not self.closing:
            logger.error("%s; ending rank 0, too", error)
            sys.stderr.flush()
            os._exit(CRASH)

    def _wake(self) -> None:
        if self._dry and self.running:
            with self.line.lock:
                dry, self._dry = self._dry, set()
                for engine in dry:
                    with contextlib.suppress(LostRankError):
                        self.links[engine].send(messages.More())

    # In the thread of the engine

    def _tell(self, message: Any) -> None:
        self._check()
        for link in self.links.values():
            try:
                link.send(message)
            except LostRankError as error:
                self._lost = self._lost or error
        self._check()

    def _check(self) -> None:
        """Raises LostRankError where an engine has gone, with what is known of why."""
        if self._lost is None:
            return
        self._told.set()
        said, end = "", time.monotonic() + 1.0
        while self.processes is not None and not (said := self.processes.lost) and time.monotonic() < end:
            time.sleep(0.02)  # its thread has to see it end
        if self.processes is not None:
            self.processes.told.set()
        failed = "failed" in str(self._lost)
        raise LostRankError(str(self._lost) if failed or not said else said) from self._lost

    @contextlib.contextmanager
    def beginning(self, capacity: Capacity, job: Job, exactly: bool) -> Iterator[None]:
        """Engines take requests as soon as the body has planned a job, if they do not already. Raises LostRankError."""

        def begin() -> None:
            with self.line.lock:
                self.line.slots[0] = capacity.planner.engine_plan.policy.block_size
                if not self.running:
                    self.run, self.running, self.handing, self._dry = self.run + 1, True, True, set()
            self._tell(messages.BeginRun(self.run, run_plan(capacity, job, exactly)))

        with planned(capacity, begin):
            yield

    @contextlib.contextmanager
    def preparing(self, capacity: Capacity, job: Job) -> Iterator[None]:
        """Engines make room for a job while the body does. Raises LostRankError."""
        with planned(capacity, lambda: self._tell(messages.Prepare(run_plan(capacity, job, True)))):
            yield
        self._gather(messages.Prepared)

    def place(self, capacity: Capacity) -> None:
        """Engines place their weights for the job that is planned for. Raises LostRankError."""
        self._tell(messages.PlaceFor(run_plan(capacity, capacity.planner.problem.job, True)))

    def finished(self, wait: bool) -> Iterator[tuple[Request, Completion, bool]]:
        """What other engines have finished, and whether they refused it. wait: for a moment, if there is nothing.
        Raises LostRankError."""
        self._check()
        with contextlib.suppress(queue.Empty):
            request, ended = self._ended.get(wait, POLL_SECONDS)
            while True:
                yield request, ended.completion, ended.refused
                request, ended = self._ended.get_nowait()

    def give_back(self) -> None:
        """Have what others have not begun wait here again, and hand out nothing more in this run."""
        if self.running and self.handing:
            self.handing = False
            self._tell(messages.GiveBack())

    def drop(self, indices: set[int]) -> None:
        if indices and self.running:
            self._tell(messages.Drop(frozenset(indices)))

    def end_run(self) -> None:
        with self.line.lock:
            running, self.running = self.running, False
            while not self._ended.empty():
                self._ended.get()
        if running and self._lost is None:
            self._tell(messages.EndRun())

    def wait_until_open(self) -> None:
        """Until each has looked at what its host has free: nobody takes anything before. Raises LostRankError."""
        self._gather(messages.Opened)

    def reports(self) -> list[Mapping[str, Any]]:
        """Of every other engine, by their numbers, once each is between two passes."""
        self._tell(messages.AskReport())
        return [report.report for report in self._gather(messages.Reported)]

    def _gather(self, kind: type) -> list[Any]:
        found: list[Any] = []
        while len(found) < len(self.links):
            answer = self._answers.get()
            if isinstance(answer, LostRankError):
                self._check()
            elif isinstance(answer, kind):
                found.append(answer)
        return found

    def close(self) -> None:
        torch.set_num_threads(self.threads)
        self.closing = True
        for link in self.links.values():
            with contextlib.suppress(LostRankError):
                link.send(messages.EndEngine())
        if self.processes is not None:
            self.processes.close()
        for link in self.links.values():
            link.close()


def run_plan(capacity: Capacity, job: Job, exactly: bool) -> messages.RunPlan:
    planner = capacity.planner
    return messages.RunPlan(job, exactly, planner.machine.known, planner.engine_plan.policy)


def line_of(others: OtherEngines | None, given: WaitingLine | None) -> WaitingLine:
    """Where an engine's requests wait: where it was told, with others, or alone."""
    if given is not None:
        return given
    return WaitingLine() if others is None else others.line


def prepare_everywhere(others: OtherEngines | None, capacity: Capacity, job: Job) -> None:
    """Make room for a job, each engine for its part of it."""
    if others is None:
        capacity.prepare(job)
        return
    part = job.of_every(others.count)
    with others.preparing(capacity, part):
        capacity.prepare(part)


def refuse_listeners(others: OtherEngines | None, **listeners: Any) -> None:
    """Raises ConfigurationError: sequences that run in other processes cannot be looked at after every pass."""
    for name, listener in listeners.items():
        if others is not None and listener is not None:
            raise ConfigurationError(
                f"{name} is told of every pass, and with data_parallel_size={others.count} most passes run in other "
                "processes: leave it out and take whole completions, or use one engine"
            )


@contextlib.contextmanager
def planned(capacity: Capacity, on_plan: Callable[[], None]) -> Iterator[None]:
    """Calls ``on_plan`` once, when the body has decided how a job will run."""

    def once() -> None:
        capacity.on_plan = lambda: None
        on_plan()

    capacity.on_plan = once
    try:
        yield
    finally:
        capacity.on_plan = lambda: None
