"""The trace: busy time without double counting, device events on the host's clock, rows that viewers can draw."""

from __future__ import annotations

import itertools
import json
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.trace import RecordingTracer, Span, Tracer, chrome_events, covered


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeEvent:
    """A timing event of a device whose clock runs 7 seconds ahead of the host's and finishes work when told."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.done = clock, True

    def record(self, stream: object = None) -> None:
        self.at = self.clock.now + 7

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True

    def elapsed_time(self, end_event: FakeEvent) -> float:
        return 1e3 * (end_event.at - self.at)


def device_tracer() -> tuple[RecordingTracer, Clock]:
    clock = Clock()
    return RecordingTracer(clock=clock, event=lambda: FakeEvent(clock)), clock


def test_off_is_nothing_and_costs_nothing(tmp_path: Path) -> None:
    tracer = Tracer()
    with tracer.span("h2d", "weights", num_bytes=5), tracer.compute_span("attention"):
        pass
    assert tracer.device_span("h2d", "weights") is None and tracer.summary() == {} and not tracer.on
    start = time.thread_time()  # which does not go on while others have the core
    for _ in range(10_000):
        with tracer.span("h2d", "weights", num_bytes=5):
            pass
    assert time.thread_time() - start < 0.2  # 20 microseconds each, about 50 times what it takes
    with pytest.raises(ValueError, match="the trace is off"):
        tracer.write(tmp_path / "trace.json")


def test_summary_counts_parallel_spans_once() -> None:
    tracer = RecordingTracer()
    tracer.add("disk_read", "a", 0.0, 4.0, 100)
    tracer.add("disk_read", "b", 1.0, 3.0, 50)
    tracer.add("disk_read", "c", 3.5, 5.0, 50)
    tracer.add("h2d", "d", 8.0, 10.0, 30)
    tracer.add("tick", "t", 0.0, 10.0)
    use = tracer.summary()
    assert list(use) == ["h2d", "disk_read"]
    assert (use["disk_read"].busy, use["disk_read"].num_bytes, use["disk_read"].rate, use["disk_read"].share) == (
        5.0,
        200,
        40.0,
        0.5,
    )
    assert (use["h2d"].busy, use["h2d"].wall, use["h2d"].spans) == (2.0, 10.0, 1)
    assert RecordingTracer().summary() == {}


intervals = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=25)


@given(intervals=intervals)
def test_covered_time_is_that_of_the_union(intervals: list[tuple[int, int]]) -> None:
    spans = sorted(
        (Span("host", "x", start, start + length) for start, length in intervals), key=lambda span: span.start
    )
    assert covered(spans) == len({second for start, length in intervals for second in range(start, start + length)})


@given(intervals=intervals)
def test_no_row_of_the_timeline_holds_overlapping_spans(intervals: list[tuple[int, int]]) -> None:
    spans = sorted(
        (Span("disk_read", f"{start}", start, start + length, 8) for start, length in intervals),
        key=lambda span: (span.start, -span.end),
    )
    events = [event for event in chrome_events(spans) if event["ph"] == "X"]
    assert len(events) == len(spans)
    for row in {event["tid"] for event in events}:
        own = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event["tid"] == row)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(own))


def test_host_spans_are_timed_also_when_the_body_raises() -> None:
    clock = Clock()
    tracer = RecordingTracer(clock=clock)
    with pytest.raises(KeyError), tracer.span("host", "work", num_bytes=3):
        clock.now += 2
        raise KeyError
    with tracer.compute_span("attention"):
        clock.now += 1
    assert tracer.spans() == [Span("host", "work", 100, 102, 3), Span("compute", "attention", 102, 103)]


def test_device_spans_land_on_the_clock_of_the_host() -> None:
    tracer, clock = device_tracer()
    clock.now = 103.0
    span = tracer.device_span("h2d", "weights 3", num_bytes=9)
    assert span is not None
    clock.now = 105.5
    span.end()
    with tracer.compute_span("mlp"):
        clock.now = 106.0
    assert tracer.spans() == [Span("h2d", "weights 3", 103, 105.5, 9), Span("compute", "mlp", 105.5, 106.0)]


def test_resolve_lets_go_of_finished_events_only() -> None:
    tracer, _ = device_tracer()
    first, second = tracer.device_span("h2d", "a"), tracer.device_span("h2d", "b")
    assert first is not None and second is not None
    first.end(), second.end()
    first.finish.done = False  # type: ignore[attr-defined]
    tracer.resolve()
    assert list(tracer.pending) == [first]
    assert {span.name for span in tracer.spans()} == {"a", "b"} and not tracer.pending


def test_a_device_span_needs_a_device() -> None:
    with pytest.raises(ValueError, match="CUDA"):
        RecordingTracer().device_span("h2d", "weights")


def test_bad_spans_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown resource 'link'"):
        RecordingTracer().add("link", "x", 0, 1)
    with pytest.raises(ValueError, match="ends 1 s before"):
        RecordingTracer().add("host", "x", 1, 0)


def test_threads_lose_no_span() -> None:
    tracer = RecordingTracer()

    def work() -> None:
        for _ in range(500):
            with tracer.span("disk_read", "layer"):
                pass

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tracer.spans()) == 4000


def test_the_file_is_a_chrome_trace_with_one_row_per_resource(tmp_path: Path) -> None:
    tracer = RecordingTracer()
    for resource, start in (("h2d", 5.0), ("compute", 5.5), ("h2d", 6.0), ("disk_read", 5.25)):
        tracer.add(resource, f"{resource} work", start, start + 1, 10)
    tracer.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    rows = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert list(rows.values()) == ["h2d link", "disk read", "gpu compute"]
    drawn = {(rows[event["tid"]], event["ts"], event["dur"]) for event in events if event["ph"] == "X"}
    assert drawn == {("h2d link", 0, 1e6), ("h2d link", 1e6, 1e6), ("gpu compute", 5e5, 1e6), ("disk read", 2.5e5, 1e6)}
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_a_folder_that_is_not_there_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        RecordingTracer().write(tmp_path / "none" / "trace.json")
