"""The engine's thread with an engine that does as it is told: who comes first, how much of a batch is in it, what a
pass that fails costs, and how it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexbatch.apps.jobs.rows import RowRequest
from flexbatch.apps.serve.batches import new_batch
from flexbatch.apps.serve.feed import BatchFeed, BatchStopped
from flexbatch.apps.serve.serving import BLOCKS_AHEAD, ENGINE_FAILED, Asked, Serving
from flexbatch.apps.serve.state import ServerState
from flexbatch.request import Completion, SamplingParams
from flexbatch.validation.errors import ConfigurationError

BLOCK = 4


class ScriptedEngine:
    """A request ends after as many passes as it has tokens; passes of ``failing`` numbers fail."""

    def __init__(self, failing: tuple[int, ...] = (), seconds: float = 0.001) -> None:
        self.policy = SimpleNamespace(block_size=BLOCK)
        self.failing, self.seconds = failing, seconds
        self.left: dict[Any, list[int]] = {}
        self.passes = self.most = 0
        self.priorities: list[int] = []
        self.aborted: list[Any] = []

    def watch(self, observer: Any) -> None: ...

    def add_request(self, token_ids: Any, params: Any, key: Any, **more: Any) -> None:
        if not token_ids:
            raise ValueError("prompt 0: is empty")
        self.left[key] = [more["priority"], params.max_tokens]
        self.priorities.append(more["priority"])
        self.most = max(self.most, len(self.left))

    def abort(self, key: Any) -> bool:
        self.aborted.append(key)
        return self.left.pop(key, None) is not None

    def has_unfinished(self) -> bool:
        return bool(self.left)

    def step(self) -> list[tuple[Any, Completion]]:
        time.sleep(self.seconds)
        self.passes += 1
        if self.passes in self.failing:
            self.left.clear()
            raise RuntimeError("out of memory")
        running = sorted(self.left, key=lambda key: self.left[key][0])[:BLOCK]
        for key in running:
            self.left[key][1] -= 1
        done = [key for key in running if not self.left[key][1]]
        return [(key, Completion([1], [2], finish_reason="stop")) for key in done if self.left.pop(key)]

    def report(self) -> dict[str, Any]:
        return {"passes": self.passes}


def asked(ends: list[Completion], tokens: int = 2, prompt: tuple[int, ...] = (1,)) -> Asked:
    return Asked(RowRequest(0, 0, 0, token_ids=prompt, params=SamplingParams(max_tokens=tokens)), ends.append)


def items(count: int, drawn: list[int] | None = None, tokens: int = 2) -> Iterator[Any]:
    for number in range(count):
        if drawn is not None:
            drawn.append(number)
        yield number, [number + 1], SamplingParams(max_tokens=tokens), "", None


@pytest.fixture
def run() -> Iterator[Any]:
    """Starts the engine's thread of an engine; what it raised is in ``errors``."""
    started = []

    def start(engine: ScriptedEngine) -> Any:
        serving, errors = Serving(engine), []

        def work() -> None:
            try:
                serving.run()
            except RuntimeError as error:
                errors.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        started.append((serving, thread))
        return SimpleNamespace(serving=serving, errors=errors, thread=thread)

    yield start
    for serving, thread in started:
        serving.stop()
        thread.join(10)
        assert not thread.is_alive()


def until(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_as_many_lines_as_keep_the_block_full_and_the_oldest_batch_first(run) -> None:
    engine = ScriptedEngine()
    serving = run(engine).serving
    drawn: list[int] = []
    first, second = BatchFeed(serving), BatchFeed(serving)
    ends: list[Any] = []
    threads = [
        threading.Thread(target=lambda feed=feed, source=source: ends.extend(feed.stream(source)), daemon=True)
        for feed, source in ((first, items(2000, drawn)), (second, items(10)))
    ]
    threads[0].start()
    until(lambda: engine.passes > 3)
    threads[1].start()
    for _ in range(50):
        serving._orders.put(serving.check)
        for feed in (first, second):
            feed.check()
        time.sleep(0.002)
    assert engine.most <= BLOCKS_AHEAD * BLOCK and len(drawn) < 1500, "the batch lies in memory"
    for thread in threads:
        thread.join(60)
    assert sorted(key for key, _ in ends) == sorted([*range(2000), *range(10)])
    assert set(engine.priorities) == {1}


def test_a_pass_that_fails_costs_batches_nothing_and_is_told_to_those_who_wait(run) -> None:
    engine = ScriptedEngine(failing=(3,))
    serving, ends = run(engine).serving, []
    feed, found = BatchFeed(serving), []
    thread = threading.Thread(target=lambda: found.extend(feed.stream(items(30, tokens=5))), daemon=True)
    thread.start()
    until(lambda: engine.passes)
    serving.ask([asked(ends, 50)])
    thread.join(20)
    until(lambda: ends)
    assert sorted(key for key, _ in found) == list(range(30)) and all(each.finish_reason == "stop" for _, each in found)
    assert [each.error for each in ends] in ([ENGINE_FAILED], [""])  # it came before that pass, or after it


def test_passes_that_fail_again_and_again_end_the_server(run) -> None:
    started, ends = run(ScriptedEngine(failing=tuple(range(1, 100)))), []
    feed, raised = BatchFeed(started.serving), []

    def read() -> None:
        with pytest.raises(BatchStopped) as caught:
            list(feed.stream(items(3)))
        raised.append(caught)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    started.serving.ask([asked(ends)])
    started.thread.join(20)
    assert [str(error) for error in started.errors] == ["out of memory"]
    assert started.serving.ask([asked(ends)]) == [] and [each.error for each in ends] == [ENGINE_FAILED] * 2
    feed.stop()
    thread.join(10)
    assert raised


def test_what_cannot_be_run_is_told_and_what_is_given_up_is_gone(run) -> None:
    engine = ScriptedEngine()
    serving, ends = run(engine).serving, []
    serving.ask([asked(ends, prompt=())])
    until(lambda: ends)
    assert ends[0].error == "prompt 0: is empty"
    keys = serving.ask([asked(ends, 10**6), asked(ends, 10**6)])
    until(engine.has_unfinished)
    serving.cancel(keys)
    until(lambda: not engine.has_unfinished())
    assert engine.aborted == keys and len(ends) == 1
    assert serving.snapshot(5.0)["passes"] > 0


def test_a_stop_lets_answers_end_that_come_in_time(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that passes alone put on: a busy machine takes ten times as long for them."""
    engine = ScriptedEngine()
    clock = SimpleNamespace(monotonic=lambda: engine.passes * 0.01, sleep=time.sleep)
    monkeypatch.setattr("flexbatch.apps.serve.serving.time", clock)
    started, ends = run(engine), []
    started.serving.ask([asked(ends, 100), asked(ends, 10**9)])
    until(engine.has_unfinished)
    started.serving.stop()
    started.thread.join(60)
    assert [each.finish_reason for each in ends] == ["stop", "error"] and engine.passes < 1000


def test_a_folder_has_one_server_and_keeps_what_clients_were_told(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    state = ServerState(folder)
    with pytest.raises(ConfigurationError, match="belongs to a server that runs"):
        ServerState(folder)
    ids = [f"file-{number:024x}" for number in range(3)]
    for file_id in ids:
        state.path_of(file_id).write_bytes(b"{}\n")
    for file_id in ids[:2]:
        state.add_file({"id": file_id, "bytes": 3, "purpose": "batch"})
    request = {"input_file_id": ids[0], "endpoint": "/v1/completions", "completion_window": "90m"}
    bodies = [new_batch(request) for _ in range(3)]
    assert [state.add_batch(body, 2) for body in bodies] == [True, True, False]
    assert state.remove_file(ids[0]) and not state.remove_file(ids[0])
    state.check()
    (state.batches / "batch_left").mkdir()
    ended = state.change_batch(bodies[0]["id"], lambda body: body.update(status="completed"))
    assert ended == state.change_batch(bodies[0]["id"], lambda body: body.update(status="failed"))
    with pytest.raises(RuntimeError):
        state.change_batch(bodies[1]["id"], lambda body: (_ for _ in ()).throw(RuntimeError()))
    state.close()
    again = ServerState(folder)
    again.sweep()
    again.check()
    assert [body["id"] for body in again.unfinished_batches()] == [bodies[1]["id"]]
    assert {path.name for path in again.files.iterdir()} == {ids[1]}
    assert {path.name for path in again.batches.iterdir()} == {bodies[1]["id"]}
    assert [body["id"] for body in again.page("batches", 9, None)] == [bodies[1]["id"], bodies[0]["id"]]
    again.close()
