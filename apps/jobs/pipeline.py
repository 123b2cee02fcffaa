"""A job on the move: reading, making prompts and tokenising, generating, and writing overlap, each in its own thread.

``reader -> tables -> preparer -> windows -> engine (the calling thread) -> outcomes -> writer``, with bounded
hand-overs, so memory does not grow with the input. Nothing waits for the end of a row group or a part: the engine's
block is refilled as long as there are rows.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from flexbatch.apps.jobs.channel import Cancelled, Channel
from flexbatch.apps.jobs.interrupt import Interrupts
from flexbatch.apps.jobs.layout import Part
from flexbatch.apps.jobs.progress import Counts
from flexbatch.apps.jobs.results import Output, Record
from flexbatch.apps.jobs.rows import Row, RowError
from flexbatch.apps.jobs.sources import Source, read_parts
from flexbatch.apps.jobs.store import OutputStore
from flexbatch.apps.jobs.window import order_rows
from flexbatch.request import Completion, SamplingParams

SYNC_S = 5.0
"""Journal records reach the disk within this time, whether another row comes or not, plus the time in which a part is
written; until then a machine that loses power may lose them, a process that dies may not."""
OUTCOMES_WAITING = 4096

Encode = Callable[[Row], tuple[Row, list[int]]]
"""A row with a number for max_tokens, and the token ids of its prompt. Raises RowError with the reason why it cannot
be run."""


class Engine(Protocol):
    """What a job needs of `LLM`."""

    def stream(self, items: Iterable[tuple[Any, Any, SamplingParams]]) -> Iterator[tuple[Any, Completion]]: ...


class OutputError(OSError):
    """The output cannot be written any more: a full disk, a share that is gone."""


class TooManyErrors(RuntimeError):
    """More rows failed than --max-errors allows."""


@dataclass
class OpenPart:
    """A part with rows to do. ``records`` fills up in any order; ``left`` counts its gaps and belongs to the writer."""

    part: Part
    table: pa.Table
    records: list[Record]
    left: int
    started: bool = False


@dataclass(frozen=True)
class Outcome:
    """A finished row for the writer: a completion, or the row's own error. Without a row: look whether the part is
    whole."""

    open: OpenPart
    row: Row | None = None
    completion: Completion | None = None


@dataclass
class Pipeline:
    """One run over ``parts`` (any iterable, drawn one at a time in the order of the input).

    ``finished`` holds the records of earlier runs per part. ``max_errors`` counts the whole shard. `run` returns
    when everything is committed or, after the first Ctrl-C, when every part that had begun is.
    """

    source: Source
    parts: Iterable[Part]
    finished: dict[int, dict[int, Record]]
    output: Output
    store: OutputStore
    encode: Encode
    counts: Counts
    interrupts: Interrupts
    window_rows: int = 1024
    max_errors: int | None = None
    on_commit: Callable[[Part], None] | None = None
    _tables: Channel[tuple[Part, pa.Table]] = field(default_factory=lambda: Channel(2))
    _windows: Channel[list[tuple[OpenPart, Row, list[int]]]] = field(default_factory=lambda: Channel(2))
    _outcomes: Channel[Outcome] = field(default_factory=lambda: Channel(OUTCOMES_WAITING))
    _failure: BaseException | None = None
    _sync_due: float | None = None
    _open: dict[int, OpenPart] = field(default_factory=dict)

    def run(self, engine: Engine) -> None:
        """Raises SourceError (input gone or damaged; what was in flight is finished first), OutputError, TakenOver,
        TooManyErrors, KeyboardInterrupt, and what the engine raises. In every case the finished rows are in the
        journal and the whole parts are committed."""
        threads = [
            threading.Thread(target=target, name=target.__name__.strip("_"), daemon=True)
            for target in (self._read, self._prepare, self._write)
        ]
        for thread in threads:
            thread.start()
        flying: dict[int, tuple[OpenPart, Row]] = {}
        try:
            for key, completion in engine.stream(self._items(flying)):
                open_part, row = flying.pop(key)
                self._outcomes.put(Outcome(open_part, row, completion))
        except Cancelled:
            pass
        finally:
            self._tables.cancel()
            self._windows.cancel()
            self._outcomes.close()
            for thread in threads:
                thread.join()
        if self._failure is not None:
            raise self._failure

    def describe_open(self) -> str:
        """``3 parts, 120 rows left``: what a drain finishes."""
        started = [open_part for open_part in list(self._open.values()) if open_part.started]
        return f"{len(started)} parts, {sum(open_part.left for open_part in started):,} rows left"

    def _read(self) -> None:
        def wanted() -> Iterator[Part]:
            for part in self.parts:
                if self.interrupts.draining.is_set():
                    return
                yield part

        self._produce(self._tables, (pair for pair in read_parts(self.source, wanted())))

    @staticmethod
    def _produce(channel: Channel[Any], values: Iterator[Any]) -> None:
        try:
            for value in values:
                channel.put(value)
        except Cancelled:
            channel.close()
        except BaseException as error:
            channel.close(error)
        else:
            channel.close()

    def _prepare(self) -> None:
        self._produce(self._windows, self._make_windows())
        self._tables.cancel()

    def _make_windows(self) -> Iterator[list[tuple[OpenPart, Row, list[int]]]]:
        window: list[tuple[OpenPart, Row, list[int]]] = []
        failure: BaseException | None = None
        try:
            for part, table in self._tables:
                for entry in self._part_entries(part, table):
                    window.append(entry)
                    if len(window) >= self.window_rows:
                        yield self._ordered(window)
                        window = []
        except Exception as error:
            failure = error
        if window:
            yield self._ordered(window)
        if failure is not None:
            raise failure

    def _part_entries(self, part: Part, table: pa.Table) -> Iterator[tuple[OpenPart, Row, list[int]]]:
        finished = self.finished.pop(part.number, {})
        open_part = OpenPart(part, table, [finished.get(row) for row in range(part.rows)], part.rows - len(finished))
        self._open[part.number] = open_part
        if not open_part.left:
            self._outcomes.put(Outcome(open_part))
        for row in self.output.rows(table, part, finished.__contains__):
            if not row.error:
                try:
                    yield open_part, *self.encode(row)
                    continue
                except RowError as error:
                    row = dataclasses.replace(row, error=str(error))
            self._outcomes.put(Outcome(open_part, row))

    @staticmethod
    def _ordered(window: list[tuple[OpenPart, Row, list[int]]]) -> list[tuple[OpenPart, Row, list[int]]]:
        limits = [row.params.max_tokens or 0 for _, row, _ in window]
        return [window[place] for place in order_rows([ids for _, _, ids in window], limits)]

    def _items(self, flying: dict[int, tuple[OpenPart, Row]]) -> Iterator[tuple[int, list[int], SamplingParams]]:
        """What the engine draws. An input that fails ends it like an input that is over, so that the sequences in
        flight are finished."""
        try:
            for window in self._windows:
                for open_part, row, token_ids in window:
                    if self.interrupts.draining.is_set() and not open_part.started:
                        continue
                    if self._failure is not None:
                        return
                    open_part.started = True
                    flying[row.index] = (open_part, row)
                    yield row.index, token_ids, row.params
        except Exception as error:
            self._failure = self._failure or error

    def _write(self) -> None:
        try:
            for outcome in self._outcomes.until(lambda: self._sync_due):
                if outcome is not None:
                    self._settle(outcome[0])
                    self._sync_due = self._sync_due or time.monotonic() + SYNC_S
                if self._sync_due is not None and time.monotonic() >= self._sync_due:
                    self.store.sync()
                    self._sync_due = None
            self.store.journal.sync()
        except BaseException as error:
            self._failure = (
                OutputError(error.errno, error.strerror, error.filename or str(self.store.folder))
                if isinstance(error, OSError)
                else error
            )
            self._outcomes.cancel()
            self._windows.cancel()

    def _settle(self, outcome: Outcome) -> None:
        open_part, row = outcome.open, outcome.row
        if row is not None:
            record = (
                self.output.record(row, outcome.completion)
                if outcome.completion is not None
                else self.output.failure(row, row.error)
            )
            self.store.journal.append(open_part.part.number, row.offset, record)
            open_part.records[row.offset] = record
            open_part.left -= 1
            self._count(record)
        if open_part.left == 0:
            self.store.commit(open_part.part, open_part.table, open_part.records, self.output)
            del self._open[open_part.part.number]
            self.counts.parts_committed += 1
            if self.on_commit is not None:
                self.on_commit(open_part.part)
        if row is not None and self.max_errors is not None and self.counts.row_errors > self.max_errors:
            raise TooManyErrors(
                f"{self.counts.row_errors} rows failed, more than the {self.max_errors} that --max-errors allows; "
                f"row {row.index}: {self.output.error_of(open_part.records[row.offset])}"
            )

    def _count(self, record: Record) -> None:
        used, made = self.output.tokens_of(record)
        self.counts.rows_done += 1
        self.counts.input_tokens_total += used
        self.counts.generated_tokens_total += made
        self.counts.row_errors += bool(self.output.error_of(record))
