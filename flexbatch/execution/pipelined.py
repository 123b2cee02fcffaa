"""The loop of passes over a pipeline: a pass of each stage's own is in flight, and the oldest is committed.

::

    stage 0    layers of A | layers of B | head of A | layers of A' | head of B | layers of B' | ...
    stage 1                | A ..................... | B .................. | A' ............ |

A block has as many parts as there are stages, each with its own sequences: while one stage computes the layers of one
part, the next computes those of another, and tokens that the first part needs come back meanwhile.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from flexbatch.execution.executor import Executor
from flexbatch.execution.masks import MaskWorkers
from flexbatch.execution.pass_batch import PassBatch
from flexbatch.execution.passes import Launched, Passes, started
from flexbatch.execution.sampler import sample_tokens
from flexbatch.execution.scheduler import Scheduler
from flexbatch.trace import Tracer


@dataclass(frozen=True)
class PartInFlight:
    """A pass over the sequences of one part of the block. Its layers are launched here."""

    part: int
    launched: Launched


class PipelinedPasses:
    """Turns the loop of one scheduler over the first of several stages.

    Nobody steps aside while a pass is in flight: where somebody has to, all of them are committed first.
    """

    def __init__(
        self, scheduler: Scheduler, executor: Executor, tracer: Tracer, parts: int, masks: MaskWorkers | None = None
    ) -> None:
        self.scheduler, self.executor, self.tracer, self.parts, self.masks = scheduler, executor, tracer, parts, masks
        self.in_flight: deque[PartInFlight] = deque()
        self.latest = parts - 1
        """The part of which a pass was launched last: they take turns, also where one pass is in flight at a time."""
        scheduler.parts = parts

    def turn(self) -> PassBatch | None:
        """Launch what can be, commit the oldest pass, and return what it ran; None where there is nothing to run."""
        self.fill()
        if not self.in_flight:
            return None
        launched, scheduler = self.in_flight.popleft().launched, self.scheduler
        drawn = sample_tokens(launched.logits, scheduler.running, scheduler.proposer)
        scheduler.commit(launched.batch, drawn.read(), drawn.decoded)
        scheduler.settled = not self.in_flight
        return launched.batch

    def fill(self) -> None:
        """Have a pass of every part in flight that has something to run."""
        for part in [(self.latest + 1 + i) % self.parts for i in range(self.parts)]:
            if any(each.part == part for each in self.in_flight):
                continue
            if not self.scheduler.has_work() or not self.may_compose:
                return
            self.launch(part)
        assert self.in_flight, "sequences run, and none of them brings anything to a pass"

    @property
    def may_compose(self) -> bool:
        """Whether a pass can be composed beside those in flight: nobody has to step aside for it, and the runner not to
        grow."""
        scheduler = self.scheduler
        displacing = scheduler.aside.recomputes and scheduler.displaces
        return not self.in_flight or (not (scheduler.reaching or displacing) and scheduler.block.all_can_grow())

    def launch(self, part: int) -> None:
        """Compose a pass and launch the layers of this stage."""
        batch = self.scheduler.next_pass(part, self.parts)
        if not batch.micro_batches:
            return
        self.tracer.begin_pass()
        if self.masks is not None:
            self.masks.begin(batch.others, self.scheduler.running)
        self.in_flight.append(PartInFlight(part, Launched(batch, started(self.executor.run(batch)))))
        self.scheduler.settled, self.latest = False, part

    def forget(self) -> None:
        """Bring what is in flight to its end, and let go of it."""
        while self.in_flight:
            for _ in self.in_flight.popleft().launched.logits:
                pass
            if self.scheduler.proposer is not None:
                self.scheduler.proposer.observe({})
        self.scheduler.settled = True

    def give_up(self) -> None:
        """Let go of what is in flight, which may have failed."""
        self.in_flight.clear()

    def check(self) -> None:
        """Invariants: a pass of each part at most, and it brings what follows the tokens that are there."""
        parts = [each.part for each in self.in_flight]
        assert len(parts) == len(set(parts)) and self.scheduler.settled != bool(parts), parts
        for query in (query for each in self.in_flight for query in each.launched.batch):
            sequence = self.scheduler.running.get(query.sequence_id)
            if sequence is not None:
                assert query.start == sequence.num_cached, query


def passes_of(
    scheduler: Scheduler, executor: Executor, tracer: Tracer, ahead: bool | None, masks: MaskWorkers | None
) -> Passes | PipelinedPasses:
    """The loop for where the executor stands. ahead: see `Passes`; None: where nothing but the host is waited for. A
    pipeline has passes in flight anyway."""
    if executor.stages is None:
        return Passes(scheduler, executor, tracer, executor.on_one_gpu if ahead is None else ahead, masks)
    return PipelinedPasses(scheduler, executor, tracer, executor.stages.stages, masks)
