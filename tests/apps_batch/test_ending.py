"""How a job ends that is stopped while rows of it are being written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from flexbatch.apps.jobs.channel import Channel
from flexbatch.apps.jobs.journal import Journal
from flexbatch.apps.jobs.store import OutputStore
from flexbatch.cli.interrupt import Interrupts
from flexbatch.validation.errors import INTERRUPTED
from tests.apps_batch.fake import FakeLLM
from tests.apps_batch.helpers import benchmark_prompts, read_output, run_here, write_input

ROWS = 40


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGINT)], ids=["SIGTERM", "twice"])
def test_rows_that_wait_for_the_writer_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: Sequence[int]
) -> None:
    """A signal that stops a job may come when all rows have their answers and only the writer is behind: its disk is
    slow, or the machine is busy."""
    answered, handled, closed = threading.Event(), threading.Event(), threading.Event()
    close, append, handle, close_store = Channel.close, Journal.append, Interrupts.handle, OutputStore.close
    main, count = threading.main_thread().ident, 0
    assert main is not None

    def closing(self: Channel[Any], error: BaseException | None = None) -> None:
        close(self, error)
        if threading.current_thread() is threading.main_thread():
            answered.set()

    def appending(self: Journal, part: int, row: int, record: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            assert answered.wait(60)
            for number in signals:
                handled.clear()
                signal.pthread_kill(main, number)
                while not handled.wait(0.02):  # one that comes just before a thread begins to wait is seen after that
                    signal.pthread_kill(main, signal.SIGUSR1)
            if closed.wait(0.5):  # it is not where all is well
                raise SystemExit  # as the process ends then
        append(self, part, row, record)

    def handling(self: Interrupts, number: int, frame: FrameType | None) -> None:
        handled.set()
        handle(self, number, frame)

    def closing_store(self: OutputStore) -> None:
        closed.set()
        close_store(self)

    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    monkeypatch.setattr(Channel, "close", closing)
    monkeypatch.setattr(Journal, "append", appending)
    monkeypatch.setattr(Interrupts, "handle", handling)
    monkeypatch.setattr(OutputStore, "close", closing_store)
    source = write_input(tmp_path / "in.parquet", benchmark_prompts(ROWS))
    words, first, second = (source, tmp_path / "out", "--part-rows", 50), FakeLLM(block=64), FakeLLM()
    try:
        assert run_here(*words, fake=first) == INTERRUPTED
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert first.prompts_seen == ROWS
    monkeypatch.undo()
    assert run_here(*words, fake=second) == 0
    assert second.prompts_seen == 0
    assert read_output(tmp_path / "out")["id"].to_pylist() == list(range(ROWS))
