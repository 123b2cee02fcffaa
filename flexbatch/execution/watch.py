"""A run as whoever waits for it sees it: what every pass did and how long it took, and what is in flight."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from flexbatch.execution.observer import RunObserver
from flexbatch.execution.pass_batch import PassBatch
from flexbatch.execution.scheduler import Scheduler
from flexbatch.execution.sequence import Sequence

OnText = Callable[[str], None]
OnPass = Callable[[Sequence], None]
SNAPSHOT_SECONDS = 1.0
"""Between two looks at every sequence in flight: a look takes about 0.2 ms of a block of 1,000."""


@dataclass(frozen=True)
class InFlight:
    """What a sequence that runs has still to read, has generated, and may generate."""

    prompt_left: int
    new_tokens: int
    max_tokens: int


@dataclass(frozen=True)
class PassSeen:
    """What one pass did. ``in_flight`` is what it left running, None in passes that follow soon after another look."""

    seconds: float
    prompt_tokens: int
    new_tokens: int
    decoding: int
    """Sequences that brought a token, or a tree, to decode."""
    block_size: int
    """Sequences that may be in flight."""
    prompt_budget: int
    """Prompt tokens that a pass may bring."""
    chunk: int
    """Prompt tokens that a sequence may bring to a pass."""
    in_flight: tuple[InFlight, ...] | None = None
    engine: int = 0
    """Of those that share the job."""
    parts: int = 1
    """Passes in which all sequences run once: one for each stage of a pipeline."""


@dataclass(frozen=True)
class SequenceSeen:
    """A sequence that has ended. ``cut``: its limit ended it, and it might have gone on; ``failed``: it was refused, or
    could not go on, and its length says nothing."""

    prompt_tokens: int
    new_tokens: int
    cut: bool
    failed: bool = False


class Watch(RunObserver):
    """Tells ``on_pass`` and ``on_sequence``, in the thread of the engine."""

    def __init__(
        self,
        on_pass: Callable[[PassSeen], None],
        on_sequence: Callable[[SequenceSeen], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.on_pass, self.on_sequence, self.clock = on_pass, on_sequence, clock
        self.looked = float("-inf")
        self.output_tokens: dict[int, int] = {}
        """By id of a sequence in flight, where drafts make the tokens of a pass no number of its queries."""

    def told(self, seen: PassSeen | SequenceSeen) -> None:
        """What happened in another engine of the same job."""
        if isinstance(seen, PassSeen):
            self.on_pass(seen)
        else:
            self.on_sequence(seen)

    def after_pass(self, scheduler: Scheduler, batch: PassBatch, seconds: float) -> None:
        now, snapshot = self.clock(), None
        if now - self.looked >= SNAPSHOT_SECONDS:
            self.looked, snapshot = now, tuple(map(in_flight, scheduler.running.values()))
        decoding = batch.num_decoding + sum(query.start >= query.num_prompt_tokens for query in batch.others)
        policy = scheduler.policy
        self.on_pass(
            PassSeen(
                seconds,
                batch.num_prompt_tokens,
                self.new_tokens(scheduler, batch),
                decoding,
                min(scheduler.admission_limit, policy.block_size),
                scheduler.prefill_budget * policy.num_gpu_batches,
                scheduler.prefill_chunk,
                snapshot,
                scheduler.parts,
            )
        )

    def new_tokens(self, scheduler: Scheduler, batch: PassBatch) -> int:
        """Tokens that were appended to answers: one where a query ends its text, without drafts."""
        if scheduler.proposer is None:
            ends = (query.start + query.num_tokens >= query.num_prompt_tokens for query in batch.others)
            return batch.num_decoding + sum(ends)
        before, now = self.output_tokens, {}
        count = 0
        for sequence in (*scheduler.running.values(), *scheduler.finished):
            tokens = now[sequence.sequence_id] = sequence.num_output_tokens
            count += max(0, tokens - before.get(sequence.sequence_id, 0))
        self.output_tokens = now
        return count

    def after_sequence(self, sequence: Sequence) -> None:
        limit = sequence.num_output_tokens >= sequence.output.max_tokens
        failed = bool(sequence.error)
        self.on_sequence(SequenceSeen(sequence.num_prompt_tokens, sequence.num_output_tokens, limit, failed))


def first_text(on_text: OnText) -> OnPass:
    """What hands on the new text of a prompt's first sample."""

    def on_pass(sequence: Sequence) -> None:
        if sequence.request.sample == 0 and (text := sequence.output.take()):
            on_text(text)

    return on_pass


def in_flight(sequence: Sequence) -> InFlight:
    left = max(0, sequence.num_prompt_tokens - sequence.num_cached)
    return InFlight(left, sequence.num_output_tokens, sequence.output.max_tokens)
