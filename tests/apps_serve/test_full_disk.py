"""A batch whose files cannot be written for a while, at any point, goes on when they can, with what it had finished."""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexbatch.apps.serve.batches import new_batch
from flexbatch.apps.serve.feed import BatchFeed
from flexbatch.apps.serve.runs import BatchRun, Served
from flexbatch.apps.serve.state import ServerState
from flexbatch.config import EngineConfig
from tests.apps_batch.fake import FakeLLM
from tests.apps_serve.helpers import batch_file, line

POINTS = (
    "jobs.store.make_folder", "jobs.store.open_manifest", "jobs.grants.sync_folder", "jobs.records.os.write",
    "jobs.records.os.fsync", "jobs.store.rename_if_absent", "jobs.openai_responses.os.fsync", "serve.results.replacing",
    "jobs.text_source.DigestingStream",
)  # fmt: skip
ROWS = 30


class FakeServing(SimpleNamespace):
    """The block of a server, filled by one batch: every line is answered by the engine of `flexbatch batch`'s tests."""

    def __init__(self) -> None:
        super().__init__(llm=FakeLLM(), answered=0)

    def wake(self) -> None:
        """Nobody sleeps here."""

    def attach(self, feed: BatchFeed) -> None:
        self.attached = True
        threading.Thread(target=self._answer, args=(feed,), daemon=True).start()

    def detach(self, feed: BatchFeed) -> None:
        self.attached = False

    def _answer(self, feed: BatchFeed) -> None:
        while self.attached:
            if (asked := feed.take()) is None:
                time.sleep(0.001)
                continue
            item = (0, asked.request.token_ids, asked.request.params, "", None)
            ((_, completion),) = self.llm.stream([item])
            self.answered += 1
            asked.on_end(completion)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[ServerState]:
    found = ServerState(tmp_path / "state")
    yield found
    found.close()


def begun(state: ServerState) -> dict[str, Any]:
    data, file_id = (
        batch_file([line(f"row {row}", f"prompt {row}", max_tokens=8) for row in range(ROWS)]),
        "file-" + "0" * 24,
    )
    state.path_of(file_id).write_bytes(data)
    state.add_file({"id": file_id, "bytes": len(data), "purpose": "batch"})
    body = new_batch({"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "1h"})
    assert state.add_batch(body, 10)
    return body


def run_once(state: ServerState, serving: Any, batch_id: str) -> bool:
    """Whether the batch is to be run again."""
    ends: list[bool] = []
    body = state.batch(batch_id)
    assert body is not None
    served = Served(serving, EngineConfig(device="cpu"), {"weights": "fake"}, ("demo",), 2**20)
    run = BatchRun(state, served, body, lambda run, again: ends.append(again))
    run.start()
    run.join(60)
    assert len(ends) == 1
    return ends[0]


@pytest.mark.parametrize("point", POINTS)
def test_a_disk_that_is_full_for_a_while_costs_no_batch(
    point: str, state: ServerState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every run one call fails, the next one of each run, until a run ends before it."""
    import importlib

    *module, name = point.split(".")
    owner: Any = importlib.import_module(f"flexbatch.apps.{'.'.join(module[:2])}")
    for inner in module[2:]:
        owner = getattr(owner, inner)
    function, calls, fails_at = getattr(owner, name), [0], [0]

    def failing(*words: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == fails_at[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*words, **options)

    monkeypatch.setattr(owner, name, failing)
    body, serving = begun(state), FakeServing()
    failed = 0
    for _ in range(60):
        fails_at[0], before = calls[0] + 1 + failed, serving.answered
        again = run_once(state, serving, body["id"])
        found = state.batch(body["id"])
        assert found is not None and found["status"] != "failed", f"the {failed + 1}. failure ended the batch"
        if not again:
            break
        failed += 1
    assert found["status"] == "completed" and failed > 0
    # Answers that wait to be written when a write fails are asked for again, however many they are; none that was.
    assert serving.answered == ROWS or serving.answered - before < ROWS
    assert found["request_counts"] == {"total": ROWS, "completed": ROWS, "failed": 0}
    assert len(state.path_of(found["output_file_id"]).read_bytes().splitlines()) == ROWS
    assert not list(state.batches.iterdir())


def test_a_database_on_a_full_disk_is_an_error_of_the_system_and_goes_on(small_disk: Path) -> None:
    state = ServerState(small_disk / "state")
    body = begun(state)
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 512)
    failed = 0
    for number in range(40):
        try:
            state.change_batch(body["id"], lambda body, number=number: body.update(metadata={"text": "x" * 4000}))
        except OSError as error:
            failed += error.errno == errno.ENOSPC
    assert failed > 20
    filler.unlink()
    assert state.change_batch(body["id"], lambda body: body.update(metadata={"a": "b"}))["metadata"] == {"a": "b"}
    assert state.batch(body["id"]) == {**body, "metadata": {"a": "b"}}
    state.check()
    state.close()
