"""How far a job is, by tokens and passes: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TextIO

from flexbatch.policy.units import duration_text
from flexbatch.request import Completion

if TYPE_CHECKING:
    from flexbatch.cli.eta import AnswerSpread, PassTimes, Rest
    from flexbatch.execution.watch import InFlight, PassSeen, SequenceSeen

logger = logging.getLogger("flexbatch")

SECONDS_PER_LINE = 10.0
RATE_SECONDS = 60.0
"""Tokens a second are those of the last minute."""
REST_SECONDS = 5.0
LENGTHS = ((512, 128),)
"""Of a sequence of which nothing is known."""


class JobMeter:
    """Tokens done and expected, rates, and the time that is left, from the passes of a run.

    ``total``: sequences of the run. ``lengths``: (prompt tokens, most new tokens) of them in the order in which they
    run, or of some that are like them. Passes are told in the engine's thread and read in another.
    """

    def __init__(
        self, total: int, lengths: Sequence[tuple[int, int]] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.lengths, self.clock = total, list(lengths) or list(LENGTHS), clock
        self.passes, self.ended, self.prompt_tokens, self.new_tokens = 0, 0, 0, 0
        self.started = self.last_told = clock()
        self.times: PassTimes | None = None
        self.answers: AnswerSpread | None = None
        self.last: PassSeen | None = None
        self.in_flight_of: dict[int, tuple[InFlight, ...]] = {}
        """By engine."""
        self.window: deque[tuple[float, PassSeen]] = deque()
        self.prompts_ended = 0
        """Prompt tokens of the sequences that have ended, those included that others had read before."""
        self.draining = False
        """Whether no more sequences begin: what is left is what is in flight."""
        self._rest: Rest | None = None
        self._rest_is_of_all = True
        self._worked_out = self.started
        self._lock = threading.RLock()

    def watch(self, llm: Any) -> None:
        """Follow the runs of an engine from now on. Of one that cannot be followed, nothing is known."""
        follow = getattr(llm, "watch", None)
        if follow is None:
            return
        from flexbatch.cli.eta import UNPLANNED, AnswerSpread, PassTimes, costs_of
        from flexbatch.execution.watch import Watch

        plan = llm.engine_plan.plan
        expected = UNPLANNED[llm.engine_plan.device.type] if plan is None else costs_of(plan)
        self.times, self.answers = PassTimes(expected), AnswerSpread()
        follow(Watch(self.pass_seen, self.sequence_seen, self.clock))

    def pass_seen(self, seen: PassSeen) -> None:
        with self._lock:
            now, self.passes = self.clock(), self.passes + 1
            self.prompt_tokens += seen.prompt_tokens
            self.new_tokens += seen.new_tokens
            self.last, self.last_told = seen, now
            before = self.in_flight_of.get(seen.engine, ())
            self.in_flight_of[seen.engine] = before if seen.in_flight is None else seen.in_flight
            self.window.append((now, seen))
            while len(self.window) > 1 and self.window[0][0] - self.window[0][1].seconds < now - RATE_SECONDS:
                self.window.popleft()
            assert self.times is not None
            if self.passes == 2:
                # The first one compiled kernels and touched memory for the first time.
                self.times = type(self.times)(tuple(self.times.expected))
            self.times.add(seen.prompt_tokens, seen.decoding, seen.seconds)

    def sequence_seen(self, seen: SequenceSeen) -> None:
        with self._lock:
            self.ended += 1
            if not seen.failed:
                assert self.answers is not None
                self.prompts_ended += seen.prompt_tokens
                self.answers.add(seen.new_tokens, seen.cut)

    @property
    def engines(self) -> int:
        """That have run passes."""
        return max(1, len(self.in_flight_of))

    @property
    def in_flight(self) -> tuple[InFlight, ...]:
        """In all engines."""
        return tuple(each for engine in self.in_flight_of.values() for each in engine)

    @property
    def rates(self) -> tuple[float, float]:
        """Prompt tokens and new tokens a second, over the last minute."""
        with self._lock:
            if not self.window:
                return 0.0, 0.0
            first, seen = self.window[0]
            seconds = max(self.clock() - (first - seen.seconds), 1e-9)
            tokens = [(each.prompt_tokens, each.new_tokens) for _, each in self.window]
        return sum(prompt for prompt, _ in tokens) / seconds, sum(new for _, new in tokens) / seconds

    def rest(self) -> Rest | None:
        """What is left, as of a pass that is at most five seconds, or a twentieth of the run, ago; None before the
        first. Working it out takes some 10 ms."""
        with self._lock:
            if self.last is None or self.times is None or self.answers is None:
                return None
            age = self.last_told - self._worked_out
            stale = self._rest_is_of_all and self.draining
            if self._rest is None or stale or age >= min(REST_SECONDS, 0.05 * (self.last_told - self.started)):
                self._rest_is_of_all = not self.draining
                self._rest, self._worked_out = self._work_out(), self.last_told
            return self._rest

    def _work_out(self) -> Rest:
        assert self.last is not None and self.times is not None and self.answers is not None
        from flexbatch.cli.eta import Waiting, rest_of

        begun = self.ended + len(self.in_flight)
        waiting = Waiting(0 if self.draining else max(0, self.total - begun), self.lengths, begun)
        steps = sum(each.decoding for _, each in self.window)
        new = sum(each.new_tokens for _, each in self.window)
        # Prompts that end in a pass bring a token, too: without drafts no sequence has more than one a pass.
        per_step = new / steps if steps and new > 1.5 * steps else 1.0
        read = self.prompts_ended + sum(self.prompt_of(each) for each in self.in_flight)
        share = min(1.0, self.prompt_tokens / read) if read else 1.0
        return rest_of(self.in_flight, waiting, self.last, self.times, self.answers, per_step, share, self.engines)

    def prompt_of(self, sequence: InFlight) -> float:
        """Prompt tokens that a sequence in flight has behind it, by the mean of those that are expected."""
        mean = sum(prompt for prompt, _ in self.lengths) / len(self.lengths)
        return max(0.0, mean - sequence.prompt_left)

    @property
    def seconds_left(self) -> float | None:
        """By the passes that are needed, and what happened between passes in the last minute; None before the first."""
        rest = self.rest()
        if rest is None:
            return None
        with self._lock:
            first, seen = self.window[0]
            wall = self.window[-1][0] - (first - seen.seconds)
            busy = sum(each.seconds for _, each in self.window) / self.engines
            waited = self.clock() - self._worked_out
        return max(0.0, rest.seconds * max(1.0, wall / max(busy, 1e-9)) - waited)

    def text(self) -> str:
        """Tokens done of those expected, rates, and the time left."""
        rest, left = self.rest(), self.seconds_left
        if rest is None or left is None:
            return "first pass under way"
        read, wrote = self.rates
        prompts, new = self.prompt_tokens + rest.prompt_tokens, self.new_tokens + rest.new_tokens
        return (
            f"pass {self.passes:,}; read {self.prompt_tokens:,} of about {prompts:,.0f} prompt tokens, wrote "
            f"{self.new_tokens:,} of about {new:,.0f}; {read:,.0f} in and {wrote:,.0f} out tokens/s, "
            f"{duration_text(left)} left"
        )


class Progress(AbstractContextManager["Progress"]):
    """Shows a `JobMeter` until closed: a bar on a terminal; elsewhere a line after the first pass, and every ten
    seconds. All on stderr."""

    unit = "completion"

    def __init__(
        self,
        total: int,
        meter: JobMeter | None = None,
        *,
        initial: int = 0,
        stream: TextIO | None = None,
        terminal: bool | None = None,
        interval_s: float = SECONDS_PER_LINE,
    ) -> None:
        self.total, self.done, self.meter = total, initial, meter or JobMeter(total)
        self._stream, self._interval_s = stream or sys.stderr, interval_s
        self._bar: Any = None
        self._stop = threading.Event()
        if self._stream.isatty() if terminal is None else terminal:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=initial,
                unit=self.unit,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} " + self.unit + "s, {elapsed}{postfix}",
            )
        self._thread = threading.Thread(target=self._loop, name="progress", daemon=True)
        self._thread.start()

    def finished(self, completion: Completion) -> None:
        """One more completion has ended."""
        self.done += 1

    def line(self) -> str:
        """How far the job is, in one line."""
        return f"{self.done:,} of {self.total:,} {self.unit}s; {self.meter.text()}"

    def bar_text(self) -> str:
        """What stands beside the bar."""
        left = self.meter.seconds_left
        read, wrote = self.meter.rates
        return f"{read:,.0f} in, {wrote:,.0f} out tok/s, {duration_text(left) if left is not None else '?'} left"

    def say(self, message: str) -> None:
        """Prints a line of its own, beside the bar."""
        if self._bar is not None:
            self._bar.write(message, file=self._stream)
        else:
            logger.info("%s", message)

    def tick(self) -> None:
        """Called with every line."""

    def _loop(self) -> None:
        said, first = time.monotonic(), True
        while not self._stop.wait(min(self._interval_s, 0.5)):
            self._show_bar()
            if time.monotonic() - said >= self._interval_s or (first and self.meter.passes):
                said, first = time.monotonic(), first and not self.meter.passes
                if self._bar is None:
                    self.say(self.line())
                self.tick()

    def _show_bar(self) -> None:
        if self._bar is not None:
            self._bar.n = self.done
            self._bar.set_postfix_str(self.bar_text())

    def close(self) -> None:
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        self._show_bar()
        if self._bar is not None:
            self._bar.close()
        self.tick()

    def __exit__(self, *error: object) -> None:
        self.close()
        if self._bar is None and error[0] is None:
            self.say(self.ending())

    def ending(self) -> str:
        """The last line: what was done, over the whole run."""
        meter = self.meter
        seconds = max(meter.clock() - meter.started, 1e-9)
        return (
            f"{self.done:,} of {self.total:,} {self.unit}s in {duration_text(seconds)}: {meter.prompt_tokens:,} prompt "
            f"tokens read, {meter.new_tokens:,} written, {meter.new_tokens / seconds:,.1f} tokens/s"
        )
