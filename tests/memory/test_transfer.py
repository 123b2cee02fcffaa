"""Transfer queues and handles: jobs in order, after what they depend on, with their errors where somebody waits."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.memory.handles import READY, EventHandle, Events, FutureHandle, Handle, together
from flexbatch.memory.transfer import ThreadQueue, TransferQueues
from flexbatch.trace import RecordingTracer, Tracer
from tests.memory.rigs import dawdle


@pytest.fixture
def queues() -> Iterator[TransferQueues]:
    made = TransferQueues(torch.device("cpu"), Tracer())
    yield made
    made.check()
    made.close()


JOBS = st.lists(
    st.tuples(st.integers(0, 5), st.lists(st.integers(0, 30), max_size=3), st.booleans()), min_size=1, max_size=16
)


@settings(max_examples=40, deadline=None)
@given(JOBS)
def test_jobs_run_in_order_after_what_they_wait_for_and_errors_travel_along(
    jobs: list[tuple[int, list[int], bool]],
) -> None:
    """Any graph of jobs over the queues: (queue, earlier jobs it waits for, whether it fails)."""
    queues, ended, handles, doomed = TransferQueues(torch.device("cpu"), Tracer()), [], [], []
    dawdle(queues, 2, 0.004)
    try:
        for number, (queue, wanted, fails) in enumerate(jobs):
            before = sorted({position % number for position in wanted} if number else set())
            doomed.append(fails or any(doomed[position] for position in before))

            def job(number: int = number, before: list[int] = before, fails: bool = fails) -> None:
                assert all(position in ended for position in before), "a job runs before what it waits for"
                if fails:
                    raise ValueError(f"job {number}")
                ended.append(number)

            handles.append(queues.all_queues[queue].submit(job, together(*(handles[position] for position in before))))
        for number, handle in enumerate(handles):
            for waiting in (handle.wait, handle.synchronize):
                if doomed[number]:
                    with pytest.raises(ValueError, match="job"):
                        waiting()
                else:
                    waiting()
                    assert number in ended
        for queue in range(6):
            mine = [number for number in ended if jobs[number][0] == queue]
            assert mine == sorted(mine)
        queues.synchronize()
        queues.check()
        assert all(
            queue.num_ended == queue.num_submitted for queue in queues.all_queues if isinstance(queue, ThreadQueue)
        )
    finally:
        queues.close()


def test_waiting_waits_for_one_job_and_not_for_those_behind_it(queues: TransferQueues) -> None:
    gate = threading.Event()
    first = queues.h2d.submit(lambda: None)
    blocked = queues.h2d.submit(gate.wait)
    other = queues.disk_read.submit(lambda: None)
    first.wait()
    other.synchronize()
    assert isinstance(blocked, FutureHandle) and not blocked.future.done()
    gate.set()
    blocked.synchronize()


def test_who_waits_first_runs_a_postponed_job_once(queues: TransferQueues) -> None:
    ran, gate = list[threading.Thread](), queues.h2d.submit(lambda: time.sleep(0.02))
    handle = queues.cpu_attention.postpone(lambda: ran.append(threading.current_thread()), gate, "a", 5)
    queues.synchronize()
    assert not ran and queues.moved_bytes()["cpu_attention"] == 5
    queues.check()
    for waiting in (handle.wait, handle.synchronize, together(handle, gate).wait):
        waiting()
        assert ran == [threading.current_thread()]
    assert queues.cpu_attention.num_ended == queues.cpu_attention.num_submitted == 1
    queues.check()


@pytest.mark.parametrize("what", ["job", "before", "interrupt"])
def test_the_error_of_a_postponed_job_is_that_of_all_who_wait(queues: TransferQueues, what: str) -> None:
    error = KeyboardInterrupt if what == "interrupt" else ValueError

    def fail() -> None:
        raise error("lost")

    before = queues.h2d.submit(fail) if what == "before" else READY
    handle = queues.cpu_attention.postpone((lambda: None) if what == "before" else fail, before, "a", 5)
    for waiting in (handle.wait, handle.synchronize):
        with pytest.raises(error, match="lost"):
            waiting()
    queues.check()


class CountedEvent:
    """Stands for an event of CUDA."""

    made = 0

    def __init__(self) -> None:
        CountedEvent.made += 1
        self.recorded = list[object]()

    def record(self, stream: object) -> None:
        self.recorded.append(stream)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=40))
def test_events_are_recorded_anew_once_nobody_has_their_handle(turns: list[int]) -> None:
    """turns: 0 records another one; n lets the n-th go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Event", CountedEvent)
        CountedEvent.made = 0
        events, held, most = Events(torch.device("cpu")), list[EventHandle](), 0
        for number, turn in enumerate(turns):
            if turn == 0:
                handle = events.record(number)  # type: ignore[arg-type]
                assert handle.event.recorded[-1] == number  # type: ignore[attr-defined]
                held.append(handle)
                del handle
            elif turn <= len(held):
                del held[turn - 1]
            most = max(most, len(held))
            assert len({id(handle.event) for handle in held}) == len(held)
            assert not {id(event) for event in events.free} & {id(handle.event) for handle in held}
        assert CountedEvent.made == most == len(held) + len(events.free)


def test_a_job_may_end_in_another_handle(queues: TransferQueues) -> None:
    """A disk read whose last part is a copy on another queue: waiting for the read waits for the copy."""
    done = []

    def slow() -> None:
        time.sleep(0.02)
        done.append("copy")

    for waiting in ("wait", "synchronize"):
        done.clear()
        getattr(queues.disk_read.submit(lambda: queues.d2h.submit(slow)), waiting)()
        assert done == ["copy"]


def test_together_is_as_small_as_it_can_be(queues: TransferQueues) -> None:
    one, two = queues.h2d.submit(lambda: None), queues.d2h.submit(lambda: None)
    assert together() is READY and together(READY, READY) is READY and together(READY, one, READY) is one
    both: Handle = together(one, READY, two)
    both.wait()
    both.synchronize()
    assert queues.mark() is READY


def test_bytes_and_spans_are_counted_by_resource() -> None:
    tracer = RecordingTracer()
    queues = TransferQueues(torch.device("cpu"), tracer)
    try:
        queues.h2d.submit(lambda: None, name="a", num_bytes=3)
        queues.pages.submit(lambda: None, name="b", num_bytes=4)
        queues.disk_write.submit(lambda: None, num_bytes=5)
        queues.synchronize()
        assert queues.moved_bytes() == {
            "h2d": 7,
            "d2h": 0,
            "disk_read": 0,
            "disk_write": 5,
            "cpu_attention": 0,
            "cpu_experts": 0,
        }
        uses = tracer.summary()
        assert {name: (use.spans, use.num_bytes) for name, use in uses.items()} == {"h2d": (2, 7), "disk_write": (1, 5)}
    finally:
        queues.close()


def test_settling_waits_for_everything_and_raises_nothing(queues: TransferQueues) -> None:
    done = []

    def fail() -> None:
        raise OSError("lost")

    failed = queues.disk_write.submit(fail)
    queues.h2d.submit(lambda: (time.sleep(0.02), done.append(1)), failed)
    queues.d2h.submit(lambda: (time.sleep(0.02), done.append(2)))
    queues.synchronize()
    assert done == [2], "what depends on a failed job does not run; what does not, does"
    with pytest.raises(OSError, match="lost"):
        failed.wait()


def test_settling_after_the_end_of_the_workers_is_done_at_once() -> None:
    """A finalizer that closes an engine when the interpreter ends comes after Python's wait for all threads."""
    queues = TransferQueues(torch.device("cpu"), Tracer())
    queues.close()
    queues.synchronize()
    script = """
import torch, weakref
from flexbatch.memory.transfer import TransferQueues
from flexbatch.trace import Tracer
queues = TransferQueues(torch.device("cpu"), Tracer())
for queue in queues.all_queues:
    queue.submit(lambda: None)
def close():
    queues.synchronize()
    queues.check()
    queues.close()
    print("closed", *(queue.num_ended for queue in queues.all_queues))
class Owner: pass
owner = Owner()
weakref.finalize(owner, close)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "closed 1 1 1 1 1 1 1 1\n", "")


def test_jobs_compute_without_gradients_and_closing_ends_the_threads() -> None:
    before = set(threading.enumerate())
    queues = TransferQueues(torch.device("cpu"), Tracer())
    modes: list[bool] = []
    for queue in queues.all_queues:
        queue.submit(lambda: modes.append(torch.is_inference_mode_enabled()))
    queues.synchronize()
    assert modes == [True] * len(queues.all_queues)
    queues.close()
    assert not set(threading.enumerate()) - before
    with pytest.raises(RuntimeError, match="shutdown"):
        queues.h2d.submit(lambda: None)
