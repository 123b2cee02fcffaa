"""The loop of passes: while one runs on the device, the host composes and launches the next, and reads its tokens late.

::

    host      compose 1  launch 1 | compose 2  launch 2 | read 1  commit 1  sample 2 | compose 3  launch 3 | read 2 ...
    device               [ layers of pass 1, tokens 1 ] [ layers of pass 2 .................., tokens 2 ] [ layers ...

Tokens stay on the device as the input of the next pass. They are read, and committed, before the logits of that pass
are sampled: so whatever decides about a token (penalties, constraints, stop strings, its place in a random stream) is
what it is when passes run one by one, and the device has a whole sweep through the layers in which to wait for nothing.
A sequence that turns out to have ended has brought one token too many; its row is never sampled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

from flexbatch.execution.executor import Executor
from flexbatch.execution.masks import MaskWorkers
from flexbatch.execution.pass_batch import LogitsChunk, NewestTokens, PassBatch
from flexbatch.execution.sampler import SampledPass, sample_tokens
from flexbatch.execution.scheduler import Scheduler
from flexbatch.trace import Tracer


@dataclass(frozen=True)
class Launched:
    """A pass whose layers are launched, and none of whose logits are sampled yet."""

    batch: PassBatch
    logits: Iterable[LogitsChunk]


@dataclass(frozen=True)
class Flight:
    """A pass that is launched whole, and whose tokens the host has not read."""

    batch: PassBatch
    drawn: SampledPass


class Passes:
    """Turns the loop of one scheduler and one executor. ``ahead``: compose each pass while the one before runs, where
    nothing needs its tokens first. ``masks``: of answers that follow a grammar, computed while their pass runs."""

    def __init__(
        self, scheduler: Scheduler, executor: Executor, tracer: Tracer, ahead: bool, masks: MaskWorkers | None = None
    ) -> None:
        self.scheduler, self.executor, self.tracer, self.ahead, self.masks = scheduler, executor, tracer, ahead, masks
        self.flight: Flight | None = None
        """Between turns the scheduler is as it was before this pass, so that it may as well be forgotten."""

    def turn(self) -> PassBatch | None:
        """Commit a pass, and return what it ran; None where there is nothing to run. The next one is in flight
        afterwards, where it could be composed."""
        flight, self.flight = self.flight or self.first(), None
        if flight is None:
            return None
        following = None
        if self.goes_ahead and self.scheduler.advance(flight.batch):
            following = self.launch(flight.drawn.newest)
        self.scheduler.commit(flight.batch, flight.drawn.read(), flight.drawn.decoded)
        if following is not None:
            self.flight = self.sample(following)
        return flight.batch

    @property
    def goes_ahead(self) -> bool:
        """Whether the next pass may be composed before the tokens of this one are read."""
        return self.ahead and self.executor.ends.takes_newest and not self.reads_tokens_first

    @property
    def reads_tokens_first(self) -> bool:
        """Whether the tokens of a pass have to be read before the next one is composed: drafts continue them, so do the
        tokens that a grammar leaves no choice about, and the host copies the pages of those that step aside, or will
        for a more urgent one."""
        scheduler = self.scheduler
        if scheduler.proposer is not None or scheduler.aside.sequences:
            return True
        return scheduler.displaces or any(sequence.needs_host for sequence in scheduler.block.others.values())

    def first(self) -> Flight | None:
        """A pass with nothing before it in flight."""
        return self.sample(self.launch()) if self.scheduler.has_work() else None

    def launch(self, newest: NewestTokens | None = None) -> Launched:
        """Compose a pass and launch its layers, all that comes before its first logits."""
        self.tracer.begin_pass()
        batch = self.scheduler.next_pass()
        if self.masks is not None:
            self.masks.begin(batch.others, self.scheduler.running)
        chunks = self.executor.run(batch) if newest is None else self.executor.run(batch, newest)
        return Launched(batch, started(chunks))

    def sample(self, launched: Launched) -> Flight:
        """Launch the rest of a pass: the tokens of those that still run."""
        scheduler = self.scheduler
        return Flight(launched.batch, sample_tokens(launched.logits, scheduler.running, scheduler.proposer))

    def forget(self) -> None:
        """Let go of the pass in flight, once the device is done with it: its buffers may be freed then."""
        flight, self.flight = self.flight, None
        if flight is not None:
            flight.drawn.read()

    def give_up(self) -> None:
        """Let go of the pass in flight, which may have failed."""
        self.flight = None

    def check(self) -> None:
        """Invariants: a pass in flight brings what follows the tokens that are there, and counts as nothing yet."""
        assert self.scheduler.advanced is None
        for query in () if self.flight is None else self.flight.batch:
            sequence = self.scheduler.running.get(query.sequence_id)
            if sequence is not None:
                assert query.start == sequence.num_cached and not sequence.num_unread, query
                assert query.start + query.num_tokens <= len(sequence.token_ids), query


def started(chunks: Iterator[LogitsChunk]) -> Iterator[LogitsChunk]:
    """The same chunks, of which the first is there."""
    return chain(list(islice(chunks, 1)), chunks)
