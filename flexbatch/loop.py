"""The loop of the engine: sequences from the intake through the scheduler and the executor, a pass at a time.

`execution.passes.Passes` is the algorithm; what else happens to a run (statistics, the comparison with its plan, text
for readers) watches it as a `RunObserver`.
"""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from flexbatch.execution.answer_lengths import AnswerLengths
from flexbatch.execution.diagnosis import explain_faults
from flexbatch.execution.job import Job
from flexbatch.execution.masks import MaskWorkers
from flexbatch.execution.observer import RunObserver
from flexbatch.execution.passes import Passes
from flexbatch.execution.pipelined import PipelinedPasses, passes_of
from flexbatch.execution.proposals import Proposer
from flexbatch.execution.runner import Runner
from flexbatch.execution.scheduler import Scheduler
from flexbatch.execution.sequence import Sequence
from flexbatch.execution.waiting import begun
from flexbatch.intake import Intake
from flexbatch.planner import learned
from flexbatch.planner.capacity import PEEKED_BLOCKS, Capacity
from flexbatch.planner.comparison import Comparison
from flexbatch.planner.engine_plan import EnginePlan
from flexbatch.planner.forecast import Forecast, JobRecord
from flexbatch.planner.monitor import PlanMonitor, monitor_of
from flexbatch.planner.other_engines import OtherEngines
from flexbatch.planner.planner import Planner
from flexbatch.planner.report import FailureLog, Statistics
from flexbatch.planner.usage import UsageTracer
from flexbatch.request import Request
from flexbatch.trace import Tracer

logger = logging.getLogger("flexbatch")


class EngineLoop:
    """Runs one block at a time. A run begins with the first request and ends when nothing is left, or fails."""

    def __init__(
        self, planner: Planner, capacity: Capacity, intake: Intake, tracer: Tracer, others: OtherEngines | None = None
    ) -> None:
        self.planner, self.capacity, self.intake, self.tracer, self.others = planner, capacity, intake, tracer, others
        self.statistics = Statistics()
        self.comparison = Comparison()
        """Runs with and without speculation, by turns, that --compare-plain asks for."""
        self.replans: list[str] = []
        self.monitor: PlanMonitor | None = None
        """The monitor of the last run that had a plan."""
        self.job_record: JobRecord | None = None
        """The record of the last job that was known whole when it began, and ran without drafts."""
        self.failures = FailureLog()
        self.lengths = AnswerLengths(planner.config.reserve)
        """Of all runs: what a job teaches is believed of the next one."""
        self.next_plan: EnginePlan | None = None
        """For those that wait, as soon as the block in flight has run empty."""
        self.masks = MaskWorkers()
        self.scheduler: Scheduler | None = None
        """The scheduler of the run that goes on; None between runs."""
        self.passes: Passes | PipelinedPasses | None = None
        self.observers: list[RunObserver] = []
        """The observers of the run that goes on."""
        self.watchers: list[RunObserver] = [] if others is None else others.watchers
        """Those that were added from outside, of every run that begins from now on."""
        self.draining = False
        """Whether what is in flight is finished and nothing else begins."""
        self.wake: Callable[[], None] = lambda: None
        """Ends a wait for items that have not come."""

    @property
    def prediction(self) -> dict[str, Any]:
        """Predicted against measured, of the last run that had a plan."""
        return self.monitor.prediction if self.monitor is not None else {}

    @property
    def engines(self) -> int:
        """That share the line of requests."""
        return 1 if self.others is None else self.others.count

    def shared(self, job: Job, exactly: bool) -> contextlib.AbstractContextManager[None]:
        """Other engines begin to run a job like this one as soon as the body has planned it."""
        return contextlib.nullcontext() if self.others is None else self.others.beginning(self.capacity, job, exactly)

    @property
    def running(self) -> bool:
        """Whether sequences are in flight."""
        return self.scheduler is not None and bool(self.scheduler.started)

    def advance(self, complete: bool) -> list[Sequence]:
        """A pass, of a new run where there is none or a request has outgrown it. complete: nothing more will come."""
        if self.draining and not self.drop_what_waits():
            return []
        if self.scheduler is not None and self.lengths.comparison_due():
            with self.statistics.replanning():
                self.plan_for_lengths(complete)
        if self.scheduler is None or (self.scheduler.outgrown and not self.running):
            self.begin_for_waiting(complete)
        return self.run_pass()

    def drain(self) -> int:
        """Finish the prompts of which a sequence is in flight, and begin no others; returns how many sequences are.

        Then a stream just ends, and a job raises KeyboardInterrupt. It sets a flag and takes no lock: signal handlers
        and other threads may call it. Where nothing runs, it is for the next call.
        """
        self.draining = True
        self.wake()
        return 0 if self.scheduler is None else len(self.scheduler.started)

    def drop_what_waits(self) -> bool:
        """Let the prompts go of which nothing is in flight; returns whether any is left."""
        scheduler = self.scheduler
        if self.others is not None:
            self.others.give_back()
        kept = self.intake.drop_all_but(set() if scheduler is None else begun(scheduler.started, scheduler.waiting))
        if scheduler is not None:
            scheduler.abort(lambda sequence: sequence.request.index not in kept)
        return bool(kept)

    def plan_for_lengths(self, complete: bool) -> None:
        """Go on in a faster block where answers are not as long as assumed. Where the one that there is cannot grow,
        sequences in flight are read anew; those of a quantized cache, whose codes would not come again, end in it."""
        scheduler, capacity, before = self.scheduler, self.capacity, self.planner.engine_plan.block_policy
        if scheduler is None or scheduler.outgrown:
            return
        ahead = self.intake.ahead(None if complete else PEEKED_BLOCKS * before.block_size)
        if not scheduler.aside.recomputes and len(scheduler.waiting) + len(ahead) <= before.block_size:
            return  # a block that runs empty first costs more than so few could gain
        known = [each.request for each in (*scheduler.started, *scheduler.waiting)]
        job = capacity.holdable(self.job(known + list(ahead)))
        job = job if complete else job.repeated(PEEKED_BLOCKS * before.block_size)
        if (found := capacity.faster_plan(job, self.statistics.pass_seconds)) is None:
            return
        self.replans.append(learned.reason(job, self.lengths.num_seen, before, found.block_policy))
        logger.info("re-planned: %s", self.replans[-1])
        record = self.job_record if self.job_record in self.observers else None
        if (runner := capacity.grown(scheduler, found, job)) is not None:
            self.compare_with_plan(runner)
        elif scheduler.aside.recomputes:
            left = scheduler.withdraw()
            self.statistics.preemptions += scheduler.aside.take_counts()
            self.end()
            runner = capacity.prepare(job, found) if complete else capacity.prepare_largest(job, found)
            self.begin(runner, left, scheduler.proposer)
        else:
            scheduler.outgrown, self.next_plan = True, found
            return
        if record is not None:
            self.observers += [] if record in self.observers else [record]
            record.going_on(Forecast(found, job, runner.sizes))

    def begin_for_waiting(self, complete: bool) -> None:
        """A run whose block suits the requests that wait, also those that its predecessor was not made for."""
        before, capacity, found = self.scheduler, self.capacity, self.next_plan
        left = [] if before is None else list(before.waiting)
        block, peeked = capacity.peeked
        ahead = self.intake.ahead(max(0, peeked - len(left)))
        job = capacity.holdable(self.job([*(each.request for each in left), *ahead]))
        if before is not None:
            self.end()
            runner = capacity.prepare_largest(job, found)
            if found is None:
                logger.info("made a larger block: a request was longer than those that the stream began with")
        else:
            exactly = complete or job.num_requests >= block
            job = job if exactly else job.repeated(block)
            with self.shared(job, exactly):
                runner = capacity.prepare(job) if exactly else capacity.prepare_largest(job)
        proposer = capacity.speculator if before is None else before.proposer
        self.begin(runner, left, proposer)

    def job(self, requests: Iterable[Request]) -> Job:
        """See `AnswerLengths.job`."""
        return self.lengths.job(requests, self.planner.deployment.model.arch.context)

    def begin(
        self, runner: Runner, left: Iterable[Sequence], proposer: Proposer | None, forecast: Forecast | None = None
    ) -> None:
        """left: sequences of the run before, which go on before anybody else. forecast: of the job, if known whole."""
        self.end()
        arrivals, overtakes = self.intake.arrivals(), self.intake.overtakes
        self.scheduler = self.capacity.scheduler(runner, arrivals, overtakes, self.lengths, left, proposer)
        self.observers = [self.statistics, self.intake, self.failures, *self.watchers]
        if forecast is not None and proposer is None:
            self.job_record = JobRecord(forecast)
            self.observers.append(self.job_record)
        executor, ahead = runner.executor, self.planner.config.goes_ahead
        self.passes = passes_of(self.scheduler, executor, self.tracer, ahead, self.masks)
        self.compare_with_plan(runner)

    def compare_with_plan(self, runner: Runner) -> None:
        """Hold the passes from now on beside the latest plan."""
        if self.monitor is not None and self.monitor in self.observers:
            self.monitor.after_run()
            self.observers.remove(self.monitor)
        monitor = self.plan_monitor(runner)
        if isinstance(self.tracer, UsageTracer):
            self.tracer.wanted = monitor is not None
        if monitor is not None:
            self.monitor = monitor
            self.observers.append(monitor)

    def plan_monitor(self, runner: Runner) -> PlanMonitor | None:
        """None where nothing was planned, or drafts change what a pass is."""
        if self.capacity.speculator is not None:
            return None
        cpu_attention = runner.sizes.max_cpu_attention_tokens > 0
        return monitor_of(self.planner, self.tracer, cpu_attention, self.statistics, self.replans)

    @torch.inference_mode()
    def run_pass(self) -> list[Sequence]:
        """One turn of the loop. Returns the sequences that have ended since the last one."""
        scheduler, passes, runner, started = self.scheduler, self.passes, self.capacity.runner, time.perf_counter()
        assert scheduler is not None and passes is not None and runner is not None
        try:
            if (batch := runner.executor.set_up.heard(passes.turn)) is not None:
                seconds = self.statistics.beside_set_up(time.perf_counter() - started, runner.executor.set_up)
                for observer in self.observers:
                    observer.after_pass(scheduler, batch, seconds)
            finished = scheduler.take_finished()
            explain_faults(finished, scheduler, runner.executor)
        except BaseException as error:
            self.fail(error)
            raise
        finally:
            self.statistics.seconds += time.perf_counter() - started
        for sequence in finished:
            for observer in self.observers:
                observer.after_sequence(sequence)
        return finished

    def fail(self, error: BaseException) -> None:
        """What was on its way may have failed half-way: no later job may find it in the cache, nor wait for it."""
        if self.passes is not None:
            self.passes.give_up()
        proposer = self.scheduler.proposer if self.scheduler is not None else None
        self.capacity.close_runner()
        if proposer is not None:
            proposer.forget()
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            # The frames of the error hold what filled the memory for as long as it is handled.
            traceback.clear_frames(error.__traceback__)
        self.drop_all()

    @torch.inference_mode()
    def end(self) -> None:
        """Give back what is in flight, and tell the observers."""
        scheduler, passes, self.scheduler, self.passes = self.scheduler, self.passes, None, None
        self.next_plan = None
        if scheduler is not None and passes is not None:
            passes.forget()
            scheduler.abort()
        self.masks.end()
        if self.capacity.weights is not None:
            # Between runs, too: what broke off here, as Ctrl-C may, would leave layers leased to the next run.
            self.capacity.weights.drain()
        if scheduler is None:
            return
        self.statistics.moved_bytes = self.capacity.queues.moved_bytes()
        for observer in self.observers:
            observer.after_run()

    @contextlib.contextmanager
    def ending(self, wake: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Leaves nothing running and nobody waiting, however the body ends. ``wake`` ends the body's wait for items."""
        self.wake = wake
        try:
            yield
        finally:
            self.wake = lambda: None
            self.drop_all()

    def abort(self, indices: set[int]) -> None:
        """Release the sequences of these prompts, which wait or run."""
        if self.scheduler is not None:
            self.scheduler.abort(lambda sequence: sequence.request.index in indices)
        if self.others is not None:
            self.others.drop(indices)

    def drop_all(self) -> None:
        self.intake.clear()
        self.end_everywhere()
        self.draining = False

    def end_everywhere(self) -> None:
        """`end`, and that of the other engines."""
        with contextlib.ExitStack() as stack:
            if self.others is not None:
                stack.callback(self.others.end_run)
            self.end()
