"""What the engine does at present, for those who look: sequences, tokens, and how fast they come."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from flexbatch.execution.observer import RunObserver
from flexbatch.execution.pass_batch import PassBatch
from flexbatch.execution.scheduler import Scheduler
from flexbatch.execution.sequence import Sequence

WINDOW_SECONDS = 60.0
"""Rates are those of the last minute."""


@dataclass(frozen=True)
class LoadSeen:
    """One look: sequences in flight and of the block, and the tokens that were read and generated so far."""

    running: int = 0
    aside: int = 0
    block: int = 0
    passes: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    pass_seconds: float = 0.0


class BlockMeter(RunObserver):
    """Watches every pass; any thread may look."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen = LoadSeen()
        self._of_running: dict[int, int] = {}
        """Tokens generated so far by the sequences that run, by id."""
        self._points: deque[tuple[float, LoadSeen]] = deque([(time.monotonic(), LoadSeen())])

    def after_pass(self, scheduler: Scheduler, batch: PassBatch, seconds: float) -> None:
        before, after = self._of_running, {}
        generated = 0
        for sequence in [*scheduler.running.values(), *scheduler.finished, *scheduler.aside.sequences]:
            tokens = sequence.num_output_tokens
            generated += max(0, tokens - before.get(sequence.sequence_id, 0))
            after[sequence.sequence_id] = tokens
        for sequence in scheduler.finished:
            after.pop(sequence.sequence_id, None)
        self._of_running = after
        old = self._seen
        self._put(
            LoadSeen(
                scheduler.num_sequences,
                len(scheduler.aside.sequences),
                scheduler.policy.block_size,
                old.passes + 1,
                old.prompt_tokens + batch.num_prompt_tokens,
                old.generated_tokens + generated,
                seconds,
            )
        )

    def after_sequence(self, sequence: Sequence) -> None:
        self._of_running.pop(sequence.sequence_id, None)

    def after_run(self) -> None:
        old = self._seen
        self._of_running = {}
        self._put(LoadSeen(0, 0, old.block, old.passes, old.prompt_tokens, old.generated_tokens, old.pass_seconds))

    def _put(self, seen: LoadSeen) -> None:
        now = time.monotonic()
        with self._lock:
            self._seen = seen
            if now - self._points[-1][0] > 1.0:
                self._points.append((now, seen))
            while len(self._points) > 2 and now - self._points[1][0] > WINDOW_SECONDS:
                self._points.popleft()

    def look(self) -> LoadSeen:
        with self._lock:
            return self._seen

    def rates(self) -> dict[str, float]:
        """Tokens a second of the last minute."""
        now = time.monotonic()
        with self._lock:
            start, first = next(
                (point for point in self._points if now - point[0] <= WINDOW_SECONDS),
                (now - WINDOW_SECONDS, self._seen),
            )
            seen = self._seen
        seconds = max(1.0, now - start)
        return {
            "generated": (seen.generated_tokens - first.generated_tokens) / seconds,
            "prompt": (seen.prompt_tokens - first.prompt_tokens) / seconds,
        }

    def describe(self) -> dict[str, Any]:
        seen = self.look()
        return {"running": seen.running, "aside": seen.aside, "block": seen.block}
