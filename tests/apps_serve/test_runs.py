"""Batches that are stopped, cancelled or late at the moment at which their results are written, and folders that cannot
be used for a while."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flexbatch.apps.serve import runs
from flexbatch.apps.serve.batches import Batches
from flexbatch.apps.serve.process import Signals
from flexbatch.apps.serve.runs import CANCELLED, EXPIRED, STOPPED, BatchRun, Served
from flexbatch.apps.serve.serving import Serving
from flexbatch.apps.serve.state import Body, ServerState
from flexbatch.config import EngineConfig
from tests.apps_batch.fake import FakeLLM
from tests.apps_serve.helpers import batch_file, records, some_lines, wait_for
from tests.apps_serve.test_serving import ScriptedEngine

LINES = 12


class Engine(ScriptedEngine):
    """With what a batch asks of an engine before its lines are run."""

    def __init__(self) -> None:
        super().__init__()
        fake = FakeLLM(max_positions=4096)
        self.tokenizer, self.arch = fake.tokenizer, fake.arch


class Host:
    """A server without HTTP: its state, the engine's thread, and what of a batch is asked for."""

    def __init__(self, folder: Path) -> None:
        self.state, self.serving = ServerState(folder), Serving(Engine())
        self.served = Served(self.serving, EngineConfig(model="demo"), {}, ("demo",), 2**20)
        self.batches = Batches(self.state, self.served, 9, 1)
        self.thread = threading.Thread(target=self.serving.run, daemon=True)
        self.thread.start()

    def create(self) -> str:
        data = batch_file(some_lines(LINES, 8))
        body = {"id": f"file-{0:024x}", "bytes": len(data), "purpose": "batch"}
        self.state.path_of(body["id"]).write_bytes(data)
        self.state.add_file(body)
        request = {"input_file_id": body["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        return str(self.batches.create(request)["id"])

    def run(self, batch_id: str, began: Callable[[BatchRun], None] = lambda run: None) -> bool:
        """A run of the batch to its end; whether it is to be run again."""
        again: list[bool] = []
        body = self.state.batch(batch_id)
        assert body is not None
        run = BatchRun(self.state, self.served, body, lambda run, wanted: again.append(wanted))
        began(run)
        run.start()
        run.join(60)
        return again[0]

    def ended(self, batch_id: str) -> Body:
        body = self.state.batch(batch_id)
        assert body is not None
        return body

    def close(self) -> None:
        self.serving.stop()
        self.thread.join(60)
        self.state.close()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path / "state")
    yield made
    made.close()


def answers(host: Host, body: Body) -> list[str]:
    return [each["custom_id"] for each in records(host.state.path_of(body["output_file_id"]).read_bytes())]


@pytest.mark.parametrize("why", [STOPPED, EXPIRED, CANCELLED])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_batch_that_has_all_its_responses_ends_whole(
    host: Host, monkeypatch: pytest.MonkeyPatch, why: str, when: str
) -> None:
    """A server that stops, a window that ends and a client that cancels may come while its results are written."""
    batch_id, write, begun = host.create(), runs.write_results, list[BatchRun]()

    def stopping() -> None:
        if why == CANCELLED:
            host.batches._runs[batch_id] = begun[0]
            host.batches.cancel(batch_id)
        else:
            begun[0].stop(why)

    def writing(*arguments: Any) -> Any:
        if when == "before":
            stopping()
        found = write(*arguments)
        if when == "after":
            stopping()
        return found

    monkeypatch.setattr(runs, "write_results", writing)
    assert not host.run(batch_id, begun.append)
    body = host.ended(batch_id)
    assert body["status"] == (CANCELLED if why == CANCELLED else "completed")
    assert body["request_counts"] == {"total": LINES, "completed": LINES, "failed": 0}
    assert answers(host, body) == [f"row {number}" for number in range(LINES)]
    assert not host.state.unfinished_batches() and not list(host.state.batches.iterdir())


def test_a_batch_that_the_server_stops_goes_on_with_the_next_one(host: Host) -> None:
    batch_id = host.create()
    assert not host.run(batch_id, lambda run: run.stop(STOPPED))
    assert [body["id"] for body in host.state.unfinished_batches()] == [batch_id]
    assert not host.run(batch_id)
    body = host.ended(batch_id)
    assert body["status"] == "completed" and len(answers(host, body)) == LINES


def test_a_batch_waits_for_a_folder_that_cannot_be_used(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk may come when a batch is opened, too. What is finished of it stays, and nobody is told that the input
    was wrong."""
    batch_id, take = host.create(), host.serving._step
    engine: Any = host.serving.llm

    def stopped_by_then(run: BatchRun) -> None:
        def step() -> None:
            take()
            if engine.passes > 12:
                run.stop(STOPPED)

        monkeypatch.setattr(host.serving, "_step", step)

    assert not host.run(batch_id, stopped_by_then)
    counts = host.ended(batch_id)["request_counts"]
    assert 0 < counts["completed"] < LINES
    with monkeypatch.context() as full:

        def no_space(*arguments: Any, **more: Any) -> None:
            raise OSError(28, "No space left on device")

        full.setattr("flexbatch.apps.jobs.store.RecordLog", no_space)
        assert host.run(batch_id)
        assert host.run(batch_id, lambda run: run.stop(EXPIRED))
    assert host.ended(batch_id)["status"] == "in_progress" and host.ended(batch_id)["errors"] is None
    drawn = len(engine.priorities)
    monkeypatch.undo()
    assert not host.run(batch_id)
    assert host.ended(batch_id)["status"] == "completed"
    assert len(answers(host, host.ended(batch_id))) == LINES
    assert len(engine.priorities) - drawn == LINES - counts["completed"], "finished lines were run again"


def test_an_alarm_breaks_off_passes_and_nothing_after_them() -> None:
    stops: list[int] = []
    signals = Signals(lambda: stops.append(1))
    with signals.installed():
        with signals.passes():
            signal.raise_signal(signal.SIGTERM)
            assert stops == [1] and signal.getitimer(signal.ITIMER_REAL)[0] > 0
            signal.raise_signal(signal.SIGALRM)
            raise AssertionError("a pass that takes longer is broken off")
        signal.raise_signal(signal.SIGALRM)  # of a timer that was faster than what batches still write
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0 and stops == [1]


def test_the_end_of_a_session_is_one_signal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        stops: list[int] = []
        signals = Signals(lambda: stops.append(1))
        with signals.installed():
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
                signal.raise_signal(number)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert stops == [1]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_batch_that_waits_is_tried_again(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexbatch.apps.serve.batches.RETRY_SECONDS", 0.01)
    failures = iter([OSError(28, "No space left on device")])
    opened = runs.Shard.open

    def failing(job: Any, assignment: Any) -> Any:
        if (error := next(failures, None)) is not None:
            raise error
        return opened(job, assignment)

    monkeypatch.setattr(runs.Shard, "open", failing)
    batch_id = host.create()
    host.batches.start()
    wait_for(lambda: host.ended(batch_id)["status"] == "completed")
    host.batches.stop(10)
    assert host.ended(batch_id)["request_counts"] == {"total": LINES, "completed": LINES, "failed": 0}
